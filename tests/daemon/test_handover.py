"""Which listening socket containerd is answered on: systemd's, a predecessor's, or our own."""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING

import pytest

from snapshotter.daemon.handover import Inheritance
from snapshotter.daemon.places import Places
from snapshotter.daemon.records import Records

if TYPE_CHECKING:
    from pathlib import Path


class Left:
    """A descriptor store with what a predecessor, or systemd, has left in it."""

    def __init__(self, **descriptors: int) -> None:
        self.descriptors = {name.replace("_", "."): fd for name, fd in descriptors.items()}

    def keep(self, name: str, descriptor: int) -> None:
        self.descriptors[name] = descriptor

    def forget(self, name: str) -> None:
        self.descriptors.pop(name, None)

    def kept(self) -> dict[str, int]:
        return dict(self.descriptors)


def listening(address: Path) -> socket.socket:
    address.unlink(missing_ok=True)
    made = socket.socket(socket.AF_UNIX)
    made.bind(os.fspath(address))
    made.listen()
    return made


def inheritance(state: Path, left: Left) -> Inheritance:
    places = Places(state / "root", state)
    return Inheritance(places, left, Records(places.records))


async def test_the_socket_unit_goes_before_what_a_predecessor_has_left(tmp_path: Path) -> None:
    address = tmp_path / "containerd.sock"
    stored = listening(address).detach()
    unit = listening(address)
    inode = address.stat().st_ino
    left = Left(containerd=stored, firstbyte_socket=os.dup(unit.fileno()))
    heir = inheritance(tmp_path, left)
    listener = heir.containerd_listener(address)
    assert os.fstat(listener.socket.fileno()).st_ino == os.fstat(unit.fileno()).st_ino
    assert "containerd" not in left.descriptors
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(stored)
    heir.close_containerd_listener(listener, address)
    assert address.stat().st_ino == inode
    unit.close()


async def test_a_socket_unit_at_another_address_is_told_and_not_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    unit = listening(tmp_path / "unit.sock")
    left = Left(firstbyte_socket=os.dup(unit.fileno()))
    heir = inheritance(tmp_path, left)
    address = tmp_path / "configured.sock"
    listener = heir.containerd_listener(address)
    assert address.is_socket()
    assert f"the configuration has {address}" in caplog.text
    heir.close_containerd_listener(listener, address)
    assert not address.exists()
    unit.close()


async def test_a_predecessors_socket_goes_on(tmp_path: Path) -> None:
    address = tmp_path / "containerd.sock"
    stored = listening(address)
    left = Left(containerd=os.dup(stored.fileno()))
    heir = inheritance(tmp_path, left)
    listener = heir.containerd_listener(address)
    assert os.fstat(listener.socket.fileno()).st_ino == os.fstat(stored.fileno()).st_ino
    heir.close_containerd_listener(listener, address)
    assert not address.exists()
    assert left.descriptors == {}
    stored.close()
