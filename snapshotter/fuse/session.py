"""The daemon's one FUSE session: opened, mounted, served, tuned and taken down.

pyfuse3 keeps the session in module globals, so a process has one at a time. The device is opened
and mounted here and not by libfuse: the descriptor can then be kept by somebody else while the
process is replaced, and neither `nosuid` nor `nodev` is added (images hold setuid programs and
device nodes, as on the file system of an ordinary unpack).

The handshake goes through here, too. libfuse is on a socket and never sees the device. There it is
given the kernel's FUSE_INIT, and its answer is read. So the kernel gets an answer that says more
than libfuse 3.14 can (idmapped mounts), a process that takes a mount over can start libfuse,
although the kernel says FUSE_INIT only once, and most requests are answered without it (`relay`):

    open_mount ─┬─► Connection ──► _libfuse, on a socket ──┬─► _accept: FUSE_INIT ──┬─► _answer
    was kept  ──┘                                          └─► _ask_again: RESEND ──┘
"""

from __future__ import annotations

import logging
import os
import select
import socket
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pyfuse3
import trio

from snapshotter.fuse import handshake
from snapshotter.fuse.answers import Answers
from snapshotter.fuse.device import FILE_SYSTEM, is_connected, open_device
from snapshotter.fuse.relay import Relay
from snapshotter.mounts import syscalls
from snapshotter.mounts.errors import MountError
from snapshotter.mounts.syscalls import MountFlag
from snapshotter.mounts.table import mount_at

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from snapshotter.fuse.handshake import InitReply, InitRequest
    from snapshotter.fuse.operations import Operations

log = logging.getLogger(__name__)

# Read-ahead decides the size of requests: 1 GiB read in order costs this process 0.33 s at 128 KiB
# (the default), 0.22 s at 1 MiB. But it does not end where a file does: at 1 MiB starts waited for
# what lies behind what they read, and nobody needs. See "Page cache" in docs/benchmarks.md.
_READ_AHEAD_KIB = 256

# The kernel lets 12 read-ahead requests be in flight in the whole mount. Twelve that wait for the
# network would hold back every other container's reads, of local data too. 256 keeps at most
# 64 MiB of page cache waiting.
_MAX_BACKGROUND = 256

_READY_SECONDS = 10.0

# One task of pyfuse3's serves one request from start to end, so this is how many may wait. Answers
# that the socket has no room for are lost, and nobody would ever know: 128 are 160 of the 208 KiB
# that it has by default. Longer ones come one at a time.
_MAX_TASKS = 128


@dataclass(frozen=True, slots=True)
class Connection:
    """A mount as the kernel knows it: all that a process needs to serve it.

    `device` is an open descriptor of /dev/fuse, non-blocking. `init` is what the kernel said when
    it was mounted, once for ever. It lives for as long as any process has the device open.
    """

    device: int
    init: bytes

    @property
    def alive(self) -> bool:
        """Whether it is still mounted somewhere."""
        return is_connected(self.device)


def open_mount(mountpoint: Path) -> Connection:
    """Mount at `mountpoint`, an absolute path of a directory; nobody answers yet. Blocks.

    Raises MountError.
    """
    device = open_device()
    try:
        options = f"fd={device},rootmode=40000,user_id=0,group_id=0,default_permissions,allow_other"
        syscalls.mount(str(mountpoint), mountpoint, FILE_SYSTEM, MountFlag.READ_ONLY, options)
        try:
            syscalls.make_private(mountpoint)
            return Connection(device, _read_request(device))
        except BaseException:
            syscalls.unmount(mountpoint, detach=True)
            raise
    except BaseException:
        os.close(device)
        raise


def close_mount(connection: Connection, mountpoint: Path) -> None:
    """Unmount: programs that still use it get errors (ENOTCONN). Blocks."""
    if mount_at(mountpoint) is not None:  # else somebody has unmounted it, which ended the session
        syscalls.unmount(mountpoint, detach=True)
    os.close(connection.device)  # the last of them ends what is still waiting


def leave(connection: Connection) -> None:
    """Leave the mount to somebody who resumes it; nobody answers in this process any more."""
    with suppress(OSError):  # an older kernel, which `serve` complains about
        os.write(connection.device, handshake.RESEND)  # who waits can be killed from now on
    os.close(connection.device)


async def serve(
    operations: Operations,
    connection: Connection,
    mountpoint: Path,
    *,
    resumed: bool,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Answer the kernel until cancelled, or unmounted from outside. Reports started when it does.

    `resumed` says that another process has answered before: what it has left unanswered is
    delivered again, and its inode numbers and handles go on. When this is cancelled the mount
    stays, and who uses it waits for somebody who resumes it. Raises MountError.
    """
    request = handshake.parse_request(connection.init)
    async with _libfuse(operations, request) as (library, reply):
        if resumed:
            _ask_again(connection.device)
        else:
            reply = handshake.refuse_async_direct(handshake.allow_idmap(reply, request))
            reply = handshake.allow_background(reply, _MAX_BACKGROUND)
            _accept(connection.device, handshake.take_up(reply, request))
        answers = Answers(operations.views, operations.failures, request)
        relay = Relay(connection.device, library, answers, operations.views, operations.failures)
        await _answer(relay, mountpoint, task_status)


def forget_name(name: bytes) -> None:
    """Have the kernel drop, soon, what it remembers of the view `name`, which is no longer shown.

    Not `invalidate_entry_async`: its thread serves a process's first session only.
    """
    with suppress(OSError):  # there is no session any more
        pyfuse3.invalidate_entry(pyfuse3.ROOT_INODE, name)


@asynccontextmanager
async def _libfuse(
    operations: Operations, request: InitRequest
) -> AsyncIterator[tuple[socket.socket, InitReply]]:
    """pyfuse3, ready to serve: the kernel's end of its socket, and its answer to FUSE_INIT, which
    is not sent. Its tasks have ended by then."""
    kind = socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK
    kernel, stand_in = socket.socketpair(socket.AF_UNIX, kind)
    with kernel:
        try:
            pyfuse3.init(operations, f"/dev/fd/{stand_in.fileno()}", {"fsname=firstbyte", "ro"})
        except BaseException:
            stand_in.close()
            raise
        stand_in.detach()  # pyfuse3.close closes it
        try:
            yield kernel, await _ask(kernel, request)
        finally:
            pyfuse3.close(unmount=False)


async def _answer_rest() -> None:
    """Let pyfuse3 answer what it is given, until cancelled."""
    await pyfuse3.main(max_tasks=_MAX_TASKS)


async def _ask(kernel: socket.socket, request: InitRequest) -> InitReply:
    """Play the kernel for one request. Raises HandshakeError, MountError if there is no answer."""
    channel = trio.socket.from_stdlib_socket(kernel)
    answer = None
    with trio.move_on_after(_READY_SECONDS):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_answer_rest)
            await channel.send(request.pack())
            answer = await channel.recv(handshake.REQUEST_BUFFER)
            nursery.cancel_scope.cancel()
    if answer is None:
        raise MountError("the FUSE library does not answer")
    return handshake.parse_reply(answer)


def _accept(device: int, reply: InitReply) -> None:
    """Answer FUSE_INIT; until then the kernel holds back all who use the mount."""
    try:
        os.write(device, reply.pack())
    except OSError as error:
        raise MountError(f"the kernel takes no answer to FUSE_INIT: {error.strerror}") from error


def _ask_again(device: int) -> None:
    """Have those requests delivered again that were read and not answered (Linux 6.9)."""
    try:
        os.write(device, handshake.RESEND)
    except OSError as error:
        log.warning(
            "who waited for the daemon that ended waits for ever: this kernel cannot repeat its "
            "requests (%s)",
            error.strerror,
        )


async def _answer(relay: Relay, mountpoint: Path, task_status: trio.TaskStatus[None]) -> None:
    async with trio.open_nursery() as nursery:

        async def answer() -> None:
            await relay.run()
            nursery.cancel_scope.cancel()

        nursery.start_soon(_answer_rest)
        nursery.start_soon(answer)
        with trio.move_on_after(_READY_SECONDS) as waiting:
            # Asks our own mount, so it returns when the kernel has had its answer to FUSE_INIT.
            await trio.to_thread.run_sync(os.stat, mountpoint, abandon_on_cancel=True)
            await trio.to_thread.run_sync(_tune, mountpoint)
        if waiting.cancelled_caught:
            raise MountError(f"the mount at {mountpoint} does not answer")
        task_status.started()


def _read_request(device: int) -> bytes:
    """The kernel's FUSE_INIT, which mount(2) has put there before it returned."""
    poll = select.poll()
    poll.register(device, select.POLLIN)
    if not poll.poll(_READY_SECONDS * 1000):
        raise MountError("the kernel does not begin to speak FUSE")
    return os.read(device, handshake.REQUEST_BUFFER)


def _tune(mountpoint: Path) -> None:
    """Raise the kernel's read-ahead for this mount, which is only slower without: it takes the
    machine's root."""
    entry = mount_at(mountpoint)
    if entry is None:
        return
    major, minor = entry.device
    try:
        read_ahead = Path(f"/sys/class/bdi/{major}:{minor}/read_ahead_kb")
        read_ahead.write_text(str(_READ_AHEAD_KIB))
    except OSError as error:
        log.info("the kernel's read-ahead stays as it is: %s", error)
