"""Looking at a real node: mounts, sockets, and servers that do or do not answer."""

from __future__ import annotations

import os
import socket
import stat
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import pytest

from snapshotter.doctor import calls
from snapshotter.doctor.calls import CallError
from snapshotter.doctor.facts import LocalFiles, collect, try_overlay
from snapshotter.doctor.recommended import Expected
from snapshotter.mounts.table import read_mounts

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def short() -> Iterator[Path]:
    """A directory whose path is short enough for sockets."""
    with tempfile.TemporaryDirectory(prefix="fb-") as path:
        yield Path(path)


@contextmanager
def snapshotter(address: Path, code: grpc.StatusCode | None) -> Iterator[None]:
    """Answers List with one message, or with an error."""

    def answer(_: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        if code is not None:
            context.abort(code, "out of order")
        yield b""
        yield b""

    class Handler(grpc.GenericRpcHandler):  # type: ignore[misc]
        def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
            assert details.method == "/containerd.services.snapshots.v1.Snapshots/List"
            return grpc.unary_stream_rpc_method_handler(answer)

    server = grpc.server(ThreadPoolExecutor(1))
    server.add_generic_rpc_handlers([Handler()])
    server.add_insecure_port(f"unix:{address}")
    server.start()
    try:
        yield
    finally:
        server.stop(None).wait()


def test_a_daemon_that_lists_its_snapshots(short: Path) -> None:
    with snapshotter(short / "s", None):
        calls.list_snapshots(short / "s")


def test_a_daemon_that_is_out_of_order(short: Path) -> None:
    with (
        snapshotter(short / "s", grpc.StatusCode.INTERNAL),
        pytest.raises(CallError, match="internal: out of order"),
    ):
        calls.list_snapshots(short / "s")


def test_nothing_at_the_socket(short: Path) -> None:
    with pytest.raises(CallError, match="nothing listens"):
        calls.list_snapshots(short / "s")


@pytest.mark.root
def test_an_overlay_on_a_disk_works_and_leaves_nothing(tmp_path: Path) -> None:
    assert try_overlay(tmp_path) is None
    assert not list(tmp_path.iterdir())
    assert not [one for one in read_mounts() if os.fsencode(tmp_path) in one.point]


@pytest.mark.root
def test_an_overlay_on_what_cannot_carry_one() -> None:
    assert try_overlay(Path("/proc"))


@pytest.mark.root
def test_a_node_with_nothing_on_it(short: Path) -> None:
    expected = Expected(short / "s.sock", short / "root/below", short / "certs.d")
    found = collect(expected, short / "containerd.sock", "no daemon runs")
    assert found.socket is None
    assert found.answer_failure == "nothing listens"
    assert isinstance(found.plugins, str)
    assert found.kernel is not None
    assert found.fuse
    assert found.overlay_failure is None
    assert found.served == "no daemon runs"
    assert not list(short.iterdir())


def test_a_socket_is_seen_as_it_is(short: Path) -> None:
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(short / "s"))
        (short / "s").chmod(0o640)
        expected = Expected(short / "s", short, short)
        found = collect(expected, short / "c", "")
    assert found.socket is not None
    assert stat.S_ISSOCK(found.socket.mode)
    assert stat.S_IMODE(found.socket.mode) == 0o640


def test_patterns_find_files_in_order(tmp_path: Path) -> None:
    for name in ("b.toml", "a.toml", "c.txt"):
        (tmp_path / name).write_text(name)
    files = LocalFiles()
    found = list(files.glob(tmp_path / "*.toml"))
    assert found == [tmp_path / "a.toml", tmp_path / "b.toml"]
    assert files.read(found[0]) == b"a.toml"
