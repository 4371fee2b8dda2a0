"""Descriptors that outlive the daemon: the FUSE session, and the socket that containerd knows.

Under systemd they are in its descriptor store (sd_notify(3), FDSTORE), which the unit turns on.
Else a holder process has them, of which there is one a state directory.
"""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from snapshotter.daemon import holder
from snapshotter.daemon.errors import DaemonError
from snapshotter.daemon.notify import notify, under_systemd

if TYPE_CHECKING:
    from collections.abc import Iterator

log = logging.getLogger(__name__)

_FIRST = 3  # SD_LISTEN_FDS_START of sd_listen_fds(3)
_ANSWER_SECONDS = 10.0
_MESSAGE = 4096
_DESCRIPTORS = 64


class DescriptorStore(Protocol):
    """Methods block shortly, and raise DaemonError."""

    def keep(self, name: str, descriptor: int) -> None:
        """Have a copy kept until `forget`; the descriptor stays the caller's."""

    def forget(self, name: str) -> None:
        """Give the copy up; one that is not there is fine."""

    def at_end(self, name: str, message: bytes) -> None:
        """Have a message written to a kept descriptor when this process ends, however it does."""

    def kept(self) -> dict[str, int]:
        """Descriptors that a predecessor had kept: those of the first call, whose they are then.

        Not to be called before the predecessor has ended.
        """


def descriptor_store(state: Path) -> DescriptorStore:
    """systemd's if it has one for this service, else the holder's."""
    if under_systemd() and "FDSTORE" in os.environ:
        return SystemdStore()
    return Holder(state / "holder.sock")


class SystemdStore:
    """The descriptor store of the service manager."""

    def __init__(self) -> None:
        self._kept: dict[str, int] = {}

    def keep(self, name: str, descriptor: int) -> None:
        self.forget(name)  # systemd keeps several of a name
        # Without polling: the store would drop a FUSE device that has an event.
        notify(f"FDSTORE=1\nFDNAME={name}\nFDPOLL=0", [descriptor])

    def forget(self, name: str) -> None:
        notify(f"FDSTOREREMOVE=1\nFDNAME={name}")

    def at_end(self, name: str, message: bytes) -> None:
        """Not here: systemd starts the next process at once."""

    def kept(self) -> dict[str, int]:
        if os.environ.pop("LISTEN_PID", "") == str(os.getpid()):
            names = os.environ.pop("LISTEN_FDNAMES", "").split(":")
            count = int(os.environ.pop("LISTEN_FDS", "0"))
            self._kept = dict(zip(names, range(_FIRST, _FIRST + count), strict=False))
            for descriptor in self._kept.values():
                os.set_inheritable(descriptor, False)
        return dict(self._kept)


class Holder:
    """The process that keeps descriptors where no service manager does."""

    def __init__(self, address: Path) -> None:
        self._address = address
        self._watched: dict[str, socket.socket] = {}
        self._kept: dict[str, int] | None = None

    def keep(self, name: str, descriptor: int) -> None:
        connection = self._connect() or self._start()
        with connection:
            self._ask(connection, b"K" + name.encode(), descriptor)

    def forget(self, name: str) -> None:
        if name in self._watched:
            self._watched.pop(name).close()
        connection = self._connect()
        if connection is not None:
            with connection:
                self._ask(connection, b"F" + name.encode())

    def at_end(self, name: str, message: bytes) -> None:
        connection = self._connect()
        if connection is None:
            return
        try:
            self._ask(connection, b"W" + name.encode() + b"\0" + message)
        except DaemonError as error:  # it may be of an earlier version, which knows no such thing
            log.info("%s", error)
            connection.close()
        else:
            self._watched[name] = connection

    def kept(self) -> dict[str, int]:
        if self._kept is None:
            self._kept = self._ask_for_kept()
        return dict(self._kept)

    def _ask_for_kept(self) -> dict[str, int]:
        connection = self._connect()
        if connection is None:
            return {}
        with connection:
            connection.send(b"A")
            names, descriptors, _, _ = socket.recv_fds(connection, _MESSAGE, _DESCRIPTORS)
        for descriptor in descriptors:
            os.set_inheritable(descriptor, False)
        return dict(zip(names.decode().split("\0"), descriptors, strict=False))

    def _connect(self) -> socket.socket | None:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        connection.settimeout(_ANSWER_SECONDS)
        try:
            connection.connect(os.fspath(self._address))
        except (FileNotFoundError, ConnectionRefusedError):
            connection.close()
            return None
        except OSError as error:
            connection.close()
            raise DaemonError(f"cannot reach the holder at {self._address}: {error}") from error
        return connection

    def _ask(self, connection: socket.socket, message: bytes, *descriptors: int) -> None:
        try:
            socket.send_fds(connection, [message], descriptors)
            answer = connection.recv(_MESSAGE)
        except OSError as error:
            raise DaemonError(f"the holder at {self._address} does not answer: {error}") from error
        if answer != b"ok":
            raise DaemonError(f"the holder at {self._address} refuses {message!r}")

    def _start(self) -> socket.socket:
        """Start a holder, in a session of its own, and connect to it."""
        self._address.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            previous = os.umask(0o177)
            try:
                listener.bind(os.fspath(self._address))
            except OSError as error:
                raise DaemonError(f"cannot listen at {self._address}: {error}") from error
            finally:
                os.umask(previous)
            listener.listen()
            subprocess.run(
                ["setsid", "--fork", *_command()],
                stdin=listener.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd="/",
                check=True,
            )
        connection = self._connect()
        if connection is None:
            raise DaemonError(f"the holder at {self._address} ended right after its start")
        return connection


def _command() -> Iterator[str]:
    """Isolated and without site-packages, it starts in 10 ms and takes few megabytes."""
    yield from (sys.executable, "-I", "-S", os.fspath(Path(holder.__file__)))
