"""The demo's own containerd, and what it starts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from snapshotter.demo.containerd import Containerd
from snapshotter.demo.errors import DemoError
from snapshotter.demo.ready import LineProbe, SignOfLifeProbe, wait_ready
from snapshotter.demo.registry import LocalRegistry
from snapshotter.demo.task import Task
from snapshotter.demo.workspace import marked_processes, mounts_below
from tests.support.cgroups import cgroups_named
from tests.support.layouts import write_layout
from tests.support.rootfs import as_layer

if TYPE_CHECKING:
    from snapshotter.demo.workspace import Workspace

pytestmark = pytest.mark.root

SECONDS = 30.0
SCRIPT = "id -u; echo $WHO $PATH; echo ready; sleep 600"


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory, rootfs: Path) -> Path:
    """A shell that tells about itself and stays, and two images that do not get so far."""
    made = tmp_path_factory.mktemp("image") / "layout"
    image = {"User": "app", "Env": ["WHO=image", "PATH=/bin"]}
    for tag, command in (("talks", ["sh", "-c", SCRIPT]), ("no-command", ["nothing"])):
        write_layout(
            made, [as_layer(rootfs)], tag=tag, config={"config": {**image, "Cmd": command}}
        )
    return made


@pytest.fixture
def registry(workspace: Workspace) -> LocalRegistry:
    return LocalRegistry(workspace)


@pytest.fixture
def containerd(workspace: Workspace, registry: LocalRegistry) -> Containerd:
    return Containerd(workspace, "containerd")


@pytest.fixture
def talks(registry: LocalRegistry, containerd: Containerd, layout: Path) -> str:
    """An image that is pulled already."""
    registry.copy_in(f"oci:{layout}:talks", "talks:latest")
    reference = f"{registry.host}/talks:latest"
    containerd.pull(reference)
    return reference


def left(workspace: Workspace) -> list[str]:
    """What containers leave: cgroups, mounts, and all processes but containerd and the registry."""
    tops = cgroups_named(workspace.path.name)
    found = [str(path) for top in tops for path in top.glob("*/")]
    found += map(str, mounts_below(workspace.path))
    for pid in marked_processes(workspace.path):
        name = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].decode()
        found += [name] if name not in ("containerd", "docker-registry") else []
    return found


def shim_sockets(workspace: Workspace) -> list[Path]:
    """Those that exist of the workspace's shims, the only things of theirs that are elsewhere."""
    files = workspace.path.glob("containerd/state/io.containerd.runtime.v2.task/*/*/address")
    sockets = [Path(file.read_text().removeprefix("unix://")) for file in files]
    return [path for path in sockets if path.exists()]


def test_a_container_is_what_its_image_says(
    workspace: Workspace, containerd: Containerd, talks: str
) -> None:
    task = Task(containerd, "test", talks)
    task.start({"WHO": "demo"})
    wait_ready(LineProbe(re.compile("^ready$")), task, workspace.interruption, SECONDS)
    assert task.output.wait(0, 0)[1] == ["1234", "demo /bin", "ready"]
    assert task.exit_status() is None
    (socket,) = shim_sockets(workspace)
    task.stop()
    task.stop()
    assert left(workspace) == []
    assert not socket.exists()


@pytest.mark.parametrize("half_removed", [False, True])
def test_what_is_left_of_a_container_ends_with_containerd(
    workspace: Workspace, containerd: Containerd, talks: str, half_removed: bool
) -> None:
    """Also of one that containerd was just removing."""
    options = ("--detach", "--null-io", "--net-host", "--cgroup", f"/{containerd.cgroup}/test")
    containerd.ctr("run", *options, "--runc-root", containerd.directory / "runc", talks, "test")
    (socket,) = shim_sockets(workspace)
    assert left(workspace)
    if half_removed:
        (address,) = workspace.path.glob(
            "containerd/state/io.containerd.runtime.v2.task/*/*/address"
        )
        address.unlink()
    containerd.stop()
    containerd.stop()
    assert cgroups_named(workspace.path.name) == []
    assert not socket.exists()


def test_a_container_that_is_stopped_at_once_leaves_nothing(
    workspace: Workspace, containerd: Containerd, talks: str
) -> None:
    sockets = []
    for attempt in range(6):
        task = Task(containerd, f"test-{attempt}", talks)
        task.start({})
        workspace.interruption.sleep(0.03 * attempt)
        sockets += shim_sockets(workspace)
        task.stop()
    sockets += shim_sockets(workspace)
    containerd.stop()
    assert cgroups_named(workspace.path.name) == []
    assert [path for path in sockets if path.exists()] == []


def test_a_command_that_is_not_in_the_image_is_an_error_that_names_it(
    workspace: Workspace, registry: LocalRegistry, containerd: Containerd, layout: Path
) -> None:
    registry.copy_in(f"oci:{layout}:no-command", "broken:latest")
    containerd.pull(f"{registry.host}/broken:latest")
    task = Task(containerd, "test", f"{registry.host}/broken:latest")
    task.start({})
    with pytest.raises(DemoError, match=r'(.|\n)*"nothing"'):
        wait_ready(SignOfLifeProbe(), task, workspace.interruption, SECONDS)


def test_an_image_that_is_nowhere_is_an_error_with_containerds_words(
    registry: LocalRegistry, containerd: Containerd
) -> None:
    reference = f"{registry.host}/nowhere:latest"
    with pytest.raises(DemoError, match=f"cannot pull {reference}(.|\n)*not found"):
        containerd.pull(reference)
