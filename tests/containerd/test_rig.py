"""What the tests of this directory stand on: containerd works here with its own snapshotter, and
nothing of it stays."""

from __future__ import annotations

import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import pytest

from snapshotter.mounts import syscalls
from snapshotter.mounts.table import read_mounts
from tests.support.debian_root import entered, shared

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from tests.support.containerd import RunningContainerd, Version

pytestmark = pytest.mark.root


def test_life_of_a_container(any_containerd: RunningContainerd, shell_image: str) -> None:
    cri = any_containerd.cri
    pulled = cri.pull(shell_image)
    image = cri.image(shell_image)
    assert image
    assert (image.id, image.tags) == (pulled, (shell_image,))
    assert Path(cri.image_usage().mountpoint).parent == any_containerd.root

    with cri.pod() as pod:
        printing = pod.start(shell_image, "/bin/sh", "-c", "echo out; exit 3")
        assert printing.wait().exit_code == 3
        assert printing.output() == "out\n"

        sleeping = pod.start(shell_image)
        assert sleeping.status().state == "running"
        done = sleeping.execute("sh", "-c", "touch /new; ls /new; echo problem >&2; exit 4")
        assert (done.stdout, done.stderr, done.exit_code) == ("/new\n", "problem\n", 4)
        sleeping.stop()
        assert sleeping.status().state == "exited"

        assert set(cri.containers()) == {printing.id, sleeping.id}
        sleeping.remove()
        assert cri.containers() == [printing.id]

    cri.remove_image(shell_image)
    assert cri.images() == []
    assert any_containerd.ctr("snapshots", "ls").splitlines()[1:] == []
    assert any_containerd.processes() == []
    assert any_containerd.mounts() == []


@pytest.mark.parametrize("version", ["1.6", "2.1"])
def test_containers_outlive_a_crash_but_not_the_test(
    run_containerd: Callable[..., AbstractContextManager[RunningContainerd]],
    version: Version,
    shell_image: str,
) -> None:
    with run_containerd(version) as containerd:
        containerd.cri.pull(shell_image)
        container = containerd.cri.run_pod().start(shell_image)
        containerd.kill()
        containerd.start()
        assert container.execute("pwd").stdout == "/\n"
        containerd.restart()
        assert container.status().state == "running"

        processes = containerd.processes()
        assert len(processes) >= 3  # shim, pause, container
        assert containerd.mounts()
        assert containerd.cgroups()
    assert not containerd.base.exists()
    assert containerd.cgroups() == []
    assert not [pid for pid in processes if _runs(pid)]


def _runs(pid: int) -> bool:
    try:
        return bool(Path(f"/proc/{pid}/cmdline").read_bytes())  # a zombie has none
    except OSError:
        return False


@pytest.mark.parametrize(("version", "local_pull"), [("1.6", False), ("2.1", False), ("2.1", True)])
def test_a_proxy_snapshotter_is_asked_with_the_image_in_labels(
    run_containerd: Callable[..., AbstractContextManager[RunningContainerd]],
    version: Version,
    local_pull: bool,
    shell_image: str,
) -> None:
    with tempfile.TemporaryDirectory(prefix="fb-") as name, _unwilling(Path(name)) as snapshotter:
        setup = {"snapshotter": "firstbyte", "proxy": snapshotter.socket, "local_pull": local_pull}
        with run_containerd(version, binds=[Path(name)], **setup) as containerd:
            with pytest.raises(grpc.RpcError, match="not today"):
                containerd.cri.pull(shell_image)
            assert shell_image.encode() in snapshotter.asked["Prepare"]
            for label in ("snapshot.ref", "snapshot/cri.image-ref", "snapshot/cri.manifest-digest"):
                assert f"containerd.io/{label}".encode() in snapshotter.asked["Prepare"]


class _Unwilling:
    """A snapshotter that remembers the last request of each call, and refuses."""

    def __init__(self, socket: Path) -> None:
        self.socket = socket
        self.asked: dict[str, bytes] = {}

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        def refuse(request: bytes, context: grpc.ServicerContext) -> bytes:
            self.asked[details.method.rpartition("/")[2]] = request
            context.abort(grpc.StatusCode.UNAVAILABLE, "not today")
            raise AssertionError("abort raises")

        return grpc.unary_unary_rpc_method_handler(refuse)


@contextmanager
def _unwilling(directory: Path) -> Iterator[_Unwilling]:
    made = _Unwilling(directory / "snapshotter.sock")
    server = grpc.server(ThreadPoolExecutor(2), handlers=[made])
    server.add_insecure_port(f"unix:{made.socket}")
    server.start()
    yield made
    server.stop(grace=None).wait(10)


def test_mounts_that_come_later_are_seen_in_the_debian_root() -> None:
    with tempfile.TemporaryDirectory(prefix="fb-") as name:
        base, point = Path(name), Path(name) / "point"
        point.mkdir()
        with shared(base), entered("sid", [base]) as root:
            for number in range(2):  # as of a daemon, and its successor
                syscalls.mount("tmpfs", point, "tmpfs", syscalls.MountFlag(0))
                (point / "file").write_text(str(number))
                assert root.run("cat", point / "file") == str(number)
                syscalls.unmount(point)
                assert root.run("ls", point) == ""


def test_what_is_done_in_the_debian_root_stays_there() -> None:
    with tempfile.TemporaryDirectory(prefix="fb-") as name, entered("sid", [Path(name)]) as root:
        root.run("mount", "-t", "tmpfs", "tmpfs", name)
        root.run("touch", "/new", Path(name) / "new")
        assert root.run("ls", "/new", name) == f"/new\n\n{name}:\nnew\n"
        assert list(Path(name).iterdir()) == []
    assert not [entry for entry in read_mounts() if name.encode() in entry.point]
    with entered("sid") as root:
        assert "new" not in root.run("ls", "/").split()
