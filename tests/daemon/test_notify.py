"""What the daemon tells systemd, heard by a stand-in for its socket."""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING

import pytest
import trio

from snapshotter.daemon.descriptors import Holder, SystemdStore, descriptor_store
from snapshotter.daemon.notify import READY, beat, notify, watchdog_seconds

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(params=["path", "abstract"])
def manager(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[socket.socket]:
    """The socket that systemd listens at, by a path or in Linux's abstract namespace."""
    address = str(tmp_path / "notify")
    if request.param == "abstract":
        address = f"\0{address}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(address)
        listener.settimeout(10)
        monkeypatch.setenv("NOTIFY_SOCKET", address.replace("\0", "@"))
        yield listener


def heard(manager: socket.socket) -> tuple[list[str], list[int]]:
    message, descriptors, _, _ = socket.recv_fds(manager, 4096, 4)
    return message.decode().split("\n"), descriptors


def test_a_state_is_one_datagram(manager: socket.socket) -> None:
    notify(READY)
    assert heard(manager) == (["READY=1"], [])


def test_nobody_is_told_without_a_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    notify(READY)


def test_a_manager_that_is_gone_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "nobody"))
    notify(READY)
    assert "systemd is not told 'READY=1'" in caplog.text


def test_a_descriptor_is_stored_in_the_place_of_its_predecessor(manager: socket.socket) -> None:
    """systemd would keep both."""
    store = SystemdStore()
    readable, writable = os.pipe()
    try:
        store.keep("fuse", writable)
        assert heard(manager) == (["FDSTOREREMOVE=1", "FDNAME=fuse"], [])
        lines, (copy,) = heard(manager)
        assert lines == ["FDSTORE=1", "FDNAME=fuse", "FDPOLL=0"]
        os.write(copy, b"the same pipe")
        os.close(copy)
        assert os.read(readable, 100) == b"the same pipe"
        store.forget("fuse")
        assert heard(manager) == (["FDSTOREREMOVE=1", "FDNAME=fuse"], [])
    finally:
        os.close(readable)
        os.close(writable)


def test_what_was_stored_is_for_the_process_it_was_given_to(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LISTEN_PID", "1")
    monkeypatch.setenv("LISTEN_FDS", "2")
    monkeypatch.setenv("LISTEN_FDNAMES", "fuse:containerd")
    assert SystemdStore().kept() == {}


@pytest.mark.parametrize("fdstore", [True, False])
def test_the_store_is_systemds_if_it_has_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fdstore: bool
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", "@somewhere")
    monkeypatch.delenv("FDSTORE", raising=False)
    if fdstore:
        monkeypatch.setenv("FDSTORE", "16")
    kind = SystemdStore if fdstore else Holder
    assert isinstance(descriptor_store(tmp_path), kind)


@pytest.mark.parametrize(
    ("usec", "pid", "expected"),
    [("60000000", None, 60.0), ("60000000", "1", None), ("", None, None), ("x", None, None)],
)
def test_how_often_a_sign_of_life_is_wanted(
    monkeypatch: pytest.MonkeyPatch, usec: str, pid: str | None, expected: float | None
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", usec)
    monkeypatch.delenv("WATCHDOG_PID", raising=False)
    if pid is not None:
        monkeypatch.setenv("WATCHDOG_PID", pid)
    assert watchdog_seconds() == expected


async def test_there_are_signs_of_life_while_all_is_well(
    manager: socket.socket, monkeypatch: pytest.MonkeyPatch, autojump_clock: object
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "60000000")
    monkeypatch.delenv("WATCHDOG_PID", raising=False)
    hangs = False

    async def check() -> None:
        if hangs:
            await trio.sleep_forever()

    manager.setblocking(False)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(beat, check)
        await trio.sleep(61)
        assert heard(manager) == (["WATCHDOG=1"], [])
        hangs = True
        await trio.sleep(1)
        while True:
            try:
                heard(manager)
            except BlockingIOError:
                break
        await trio.sleep(300)
        with pytest.raises(BlockingIOError):
            heard(manager)
        nursery.cancel_scope.cancel()
