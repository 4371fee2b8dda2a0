"""The daemon has been stopped for good: what containers on mounted images see until it is back."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from snapshotter.demo.container import Container
from snapshotter.demo.interruption import Interruption
from snapshotter.demo.workspace import Workspace
from snapshotter.registry.manifest import RunConfig
from tests.support.instance import wait_until
from tests.support.layouts import write_layout
from tests.support.leaks import becomes, shown_in
from tests.support.rootfs import as_layer, make_rootfs
from tests.support.tars import file, tar
from tests.support.workload import wait_ended

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.instance import Instance

WAITING = ("request_wait_answer", "d_alloc_parallel", "folio_wait")

pytestmark = pytest.mark.root

BIG = os.urandom(8 << 20)
READS = RunConfig(
    entrypoint=["/bin/sh", "-c"],
    cmd=["echo started; read -r line < /go; cat /big > /dev/null && echo read all"],
    env=["PATH=/bin"],
)
"""Waits for somebody to write to the FIFO /go, and reads then."""


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = make_rootfs(tmp_path_factory.mktemp("rootfs") / "root")
    os.mkfifo(root / "go")
    path = tmp_path_factory.mktemp("layout")
    write_layout(path, [as_layer(root), tar(file(b"big", BIG))])
    return f"oci:{path}"


@pytest.fixture
def workspace() -> Iterator[Workspace]:
    warnings: list[str] = []
    with Interruption() as interruption, Workspace(interruption, warnings.append) as workspace:
        yield workspace
    assert warnings == []


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
@pytest.mark.parametrize("mode", ["fuse", "erofs", "native"])
def test_containers_while_no_daemon_runs(
    here: Instance, layout: str, workspace: Workspace, mode: str, ending: signal.Signals
) -> None:
    """One that needs nothing but the disk goes on. Of the others one is killed while it waits, and
    one is patient."""
    daemon = here.start()
    target = here.directory("m")
    here.succeed("mount", layout, target, "--mode", mode)
    killed, patient = (Container(workspace, name, target) for name in ("killed", "patient"))
    for container in (killed, patient):
        container.start(READS, {})
        wait_until(lambda container=container: container.output.last(9) == "started")
    daemon.send_signal(ending)
    daemon.wait(30)
    Path("/proc/sys/vm/drop_caches").write_text("3")
    # One after the other: who waits for another one's lookup of the same name waits in a way that
    # no signal ends, so the one to be killed goes first.
    for name in ("killed", "patient"):
        _go(workspace, name)
        if mode != "native":
            wait_until(lambda name=name: _waits(workspace, name))
    if mode == "native":
        wait_until(lambda: patient.output.last(9).endswith("read all"))
        assert patient.exit_status() in (None, 0)
    else:
        assert [container.exit_status() for container in (killed, patient)] == [None, None]
        killed.stop()  # runc kills what is in it, and waits for its end
    here.start()
    wait_ended(patient)
    assert patient.exit_status() == 0
    assert patient.output.last(9) == "started\nread all"
    for container in (killed, patient):
        container.stop()
    here.succeed("umount", target)
    becomes(lambda: shown_in(here), [])


def _go(workspace: Workspace, name: str) -> None:
    """Without waiting for a reader: the container has opened it for reading already."""
    path = workspace.path / name / "bundle" / "rootfs" / "go"
    wait_until(lambda: _is_read(path))


def _is_read(path: Path) -> bool:
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
    except OSError:  # ENXIO: nobody reads it yet
        return False
    os.write(descriptor, b"go\n")
    os.close(descriptor)
    return True


def _waits(workspace: Workspace, name: str) -> bool:
    """Whether what runs in a container is in the kernel, until somebody answers it."""
    pid = (workspace.path / name / "pid").read_text()
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    stacks = [Path(f"/proc/{one}/stack").read_text() for one in (pid, *children)]
    return any(place in stack for stack in stacks for place in WAITING)
