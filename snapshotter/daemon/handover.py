"""What passes from one daemon to the next: the FUSE session, and containerd's socket.

Both are kept outside of the process (`descriptors`), so whoever waits for them goes on waiting when
it dies, and the next daemon answers.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
from contextlib import suppress
from typing import TYPE_CHECKING

import trio

from index.errors import FirstByteError
from index.file import FileIndex
from snapshotter.daemon.errors import DaemonError
from snapshotter.daemon.leftovers import detach_dead_mounts
from snapshotter.daemon.records import Records
from snapshotter.daemon.server import listen
from snapshotter.fuse.dying import is_dying, let_go
from snapshotter.fuse.handshake import RESEND
from snapshotter.fuse.session import Connection, close_mount, open_mount
from snapshotter.mounts.table import mount_at
from snapshotter.store.indexes import IndexStore

if TYPE_CHECKING:
    from pathlib import Path

    from snapshotter.daemon.descriptors import DescriptorStore
    from snapshotter.daemon.places import Places

log = logging.getLogger(__name__)

_ANSWER_SECONDS = 1.0  # a mount that nobody keeps refuses at once

_FUSE = "fuse"
_CONTAINERD = "containerd"
_SOCKET_UNIT = "firstbyte.socket"  # systemd names a socket unit's descriptor like the unit


def opened_indexes(places: Places) -> list[FileIndex]:
    """The file indexes of what a daemon shows that still runs, as far as they can be opened.

    Verifying them takes the most of a start with many images. Blocks.
    """
    store = IndexStore(places.root, writer=False)
    opened = []
    for view in Records(places.records).views:
        with suppress(OSError, ValueError, FirstByteError):  # it changes meanwhile
            digest = bytes.fromhex(view.names[0].partition(".")[0])
            path = store.get(digest)
            if path is not None:
                opened.append(FileIndex.open(path))
    return opened


class Inheritance:
    """The descriptors of a daemon, and what its predecessor left. Methods block."""

    def __init__(self, places: Places, store: DescriptorStore, records: Records) -> None:
        """Raises DaemonError."""
        self._places = places
        self._store = store
        self._records = records
        self._left = store.kept()
        self._activated = False

    def mount(self) -> tuple[Connection, bool]:
        """The FUSE mount, and whether it is a predecessor's that goes on.

        Raises MountError, and DaemonError if somebody else is to go on with it.
        """
        places = self._places
        device = self._left.pop(_FUSE, None)
        if device is not None:
            os.set_blocking(device, False)
            connection = Connection(device, self._records.init)
            if connection.init and connection.alive and mount_at(places.mount) is not None:
                log.info("going on with the file system of a daemon that has ended")
                self._store.at_end(_FUSE, RESEND)
                return connection, True
            log.warning("the file system of a daemon that has ended is gone, too")
            os.close(device)
        elif self._records.init and _is_kept_elsewhere(places.mount):
            raise DaemonError(
                f"{places.mount} waits for the daemon of a service manager",
                hint="start the service (systemctl start firstbyte), or unmount that directory",
            )
        detach_dead_mounts(places)
        places.mount.mkdir(mode=0o700, exist_ok=True)
        connection = open_mount(places.mount)
        try:
            self._records.start_afresh()
            self._store.keep(_FUSE, connection.device)
            self._store.at_end(_FUSE, RESEND)
        except BaseException:
            close_mount(connection, places.mount)
            raise
        return connection, False

    def unmount(self, connection: Connection) -> None:
        """Give the mount up, for everybody."""
        self._records.start_afresh()
        self._store.forget(_FUSE)
        close_mount(connection, self._places.mount)

    def containerd_listener(self, address: Path) -> trio.SocketListener:
        """The socket that containerd connects to. Raises DaemonError."""
        given = self._take_listener(_SOCKET_UNIT, address)
        if given is not None:
            self._activated = True
            self._discard_stored()
            return given
        left = self._take_listener(_CONTAINERD, address)
        if left is not None:
            return left
        listener = listen(address)
        self._store.keep(_CONTAINERD, listener.socket.fileno())
        return listener

    def _take_listener(self, name: str, address: Path) -> trio.SocketListener | None:
        """The socket that we were given under a name, if it is the one at `address`."""
        descriptor = self._left.pop(name, None)
        if descriptor is None:
            return None
        given = socket.socket(fileno=descriptor)
        if given.getsockname() == os.fspath(address) and address.is_socket():
            return trio.SocketListener(trio.socket.from_stdlib_socket(given))
        if name == _SOCKET_UNIT:
            log.warning(
                "%s listens at %s, which nobody serves: the configuration has %s",
                _SOCKET_UNIT,
                given.getsockname(),
                address,
            )
        given.close()
        return None

    def _discard_stored(self) -> None:
        """Give up the socket of a time before there was a socket unit: nobody can reach it."""
        descriptor = self._left.pop(_CONTAINERD, None)
        if descriptor is not None:
            os.close(descriptor)
            self._store.forget(_CONTAINERD)

    def close_containerd_listener(self, listener: trio.SocketListener, address: Path) -> None:
        """Give the socket up, for everybody; systemd's own stays its own."""
        listener.socket.close()
        if self._activated:
            return
        self._store.forget(_CONTAINERD)
        address.unlink(missing_ok=True)


def let_go_of_dying(pid: int, store: DescriptorStore) -> bool:
    """See to it that a predecessor which was killed can end, and its locks with it.

    Tells whether it was. Its sockets are still there then, so that one can connect to them.
    """
    if not is_dying(pid):
        return False
    device = store.kept().get(_FUSE)
    if device is not None:
        os.set_blocking(device, False)
        let_go(device, pid)
    return True


def _is_kept_elsewhere(mount: Path) -> bool:
    """Whether a mount that nobody answers for has not ended, because somebody has its descriptor.

    Who asks such a mount waits, in a thread that is left alone; of one that has ended, the kernel
    says so (ENOTCONN).
    """
    if mount_at(mount) is None:
        return False
    ended: list[OSError] = []

    def ask() -> None:
        try:
            os.stat(mount)
        except OSError as error:
            ended.append(error)

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(_ANSWER_SECONDS)
    return not ended
