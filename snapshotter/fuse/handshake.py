"""FUSE_INIT: what the kernel offers on a new mount, and what the server answers.

Bytes in, values out, no I/O. Layouts, names and numbers are those of the kernel's
include/uapi/linux/fuse.h; all fields are in the byte order of the machine. Both ends send the
flags they know; what the reply does not repeat is off for the whole life of the mount.

    request:  fuse_in_header (40 bytes)   fuse_init_in (64 bytes; 16 before protocol 7.36)
    reply:    fuse_out_header (16 bytes)  fuse_init_out (64 bytes)
"""

from __future__ import annotations

import enum
import os
import struct
from dataclasses import dataclass, replace

from index.errors import FirstByteError
from snapshotter.fuse.wire import IN_HEADER, OUT_HEADER, Opcode

REQUEST_BUFFER = 8192
"""FUSE_MIN_READ_BUFFER: the kernel refuses to be read with less, in bytes."""

_MAJOR = 7  # of the protocol; both sides are bound to it, minors only add

# fuse_init_in: major, minor, max_readahead, flags; since 7.36 also flags2, unused[11]
_INIT_IN = struct.Struct("=IIII")
_FLAGS2 = struct.Struct("=I")
# fuse_init_out: major, minor, max_readahead, flags, max_background, congestion_threshold,
# max_write, time_gran, max_pages, map_alignment, flags2, what later minors put into unused[7]
_INIT_OUT = struct.Struct("=IIIIHHIIHHI28s")


class HandshakeError(FirstByteError):
    """The kernel and the FUSE library do not agree, or one of them says something else."""


RESEND = OUT_HEADER.pack(OUT_HEADER.size, 7, 0)
"""A message to the kernel: fuse_out_header with FUSE_NOTIFY_RESEND in the place of an error.

It takes back what was read and not answered. Until then who waits for that cannot even be killed
(request_wait_answer in fs/fuse/dev.c)."""


class InitFlag(enum.IntFlag):
    """The flags that are decided here; all others pass as they are.

    Bits 0 to 31 are the field `flags`, the others are `flags2`, which counts with EXTENDED only.
    """

    ASYNC_DIO = 1 << 15  # Linux 3.10
    NO_OPEN_SUPPORT = 1 << 17  # Linux 3.15
    PARALLEL_DIROPS = 1 << 18  # Linux 4.7
    CACHE_SYMLINKS = 1 << 23  # Linux 4.20
    NO_OPENDIR_SUPPORT = 1 << 24  # Linux 5.1
    EXTENDED = 1 << 30  # FUSE_INIT_EXT, Linux 5.17
    ALLOW_IDMAP = 1 << 40  # FUSE_ALLOW_IDMAP, Linux 6.12


@dataclass(frozen=True, slots=True)
class InitRequest:
    """What the kernel sends once, before anything else. `unique` is the number to be answered.

    `max_readahead` is in bytes. `later` are fields of protocols after 7.36, unread.
    """

    unique: int
    minor: int
    max_readahead: int
    flags: InitFlag
    later: bytes

    def pack(self) -> bytes:
        """The message, as it is read from /dev/fuse. It comes from no process, so those are 0."""
        low, high = _split(self.flags)
        body = _INIT_IN.pack(_MAJOR, self.minor, self.max_readahead, low)
        if InitFlag.EXTENDED in self.flags:
            body += _FLAGS2.pack(high)
        body += self.later
        size = IN_HEADER.size + len(body)
        return IN_HEADER.pack(size, Opcode.INIT, self.unique, 0, 0, 0, 0, 0, 0) + body


@dataclass(frozen=True, slots=True)
class InitReply:
    """What the server will do. Sizes are in bytes, `time_granularity` in nanoseconds.

    `max_background` and `congestion_threshold` count requests. `max_pages` (of 4096 bytes on most
    machines) bounds one read or write. `later` are fields of protocols after 7.36, unread.
    """

    unique: int
    minor: int
    max_readahead: int
    flags: InitFlag
    max_background: int
    congestion_threshold: int
    max_write: int
    time_granularity: int
    max_pages: int
    map_alignment: int
    later: bytes

    def pack(self) -> bytes:
        """The message, as it is written to /dev/fuse."""
        low, high = _split(self.flags)
        header = OUT_HEADER.pack(OUT_HEADER.size + _INIT_OUT.size, 0, self.unique)
        return header + _INIT_OUT.pack(
            _MAJOR,
            self.minor,
            self.max_readahead,
            low,
            self.max_background,
            self.congestion_threshold,
            self.max_write,
            self.time_granularity,
            self.max_pages,
            self.map_alignment,
            high,
            self.later,
        )


def parse_request(message: bytes) -> InitRequest:
    """Read the kernel's first message. Raises HandshakeError if it is no FUSE_INIT that we know."""
    what = "the kernel's first message"
    end = IN_HEADER.size + _INIT_IN.size
    _check_size(what, message, end)
    _, opcode, unique, *_ = IN_HEADER.unpack_from(message)
    if opcode != Opcode.INIT:
        raise HandshakeError(f"{what} is request {opcode} and not FUSE_INIT")
    major, minor, max_readahead, low = _INIT_IN.unpack_from(message, IN_HEADER.size)
    _check_major("the kernel", major)
    high = 0
    if low & InitFlag.EXTENDED:
        _check_size(what, message, end + _FLAGS2.size)
        (high,) = _FLAGS2.unpack_from(message, end)
        end += _FLAGS2.size
    return InitRequest(unique, minor, max_readahead, InitFlag(low | high << 32), message[end:])


def parse_reply(message: bytes) -> InitReply:
    """Read a server's answer to FUSE_INIT. Raises HandshakeError if it refuses, or is none."""
    what = "the answer to FUSE_INIT"
    _check_size(what, message, OUT_HEADER.size)
    _, error, unique = OUT_HEADER.unpack_from(message)
    if error:
        raise HandshakeError(f"the FUSE library refuses this kernel: {os.strerror(-error)}")
    _check_size(what, message, OUT_HEADER.size + _INIT_OUT.size)
    fields = _INIT_OUT.unpack_from(message, OUT_HEADER.size)
    _check_major("the FUSE library", fields[0])
    low, high = fields[3], fields[10]
    return InitReply(
        unique=unique,
        minor=fields[1],
        max_readahead=fields[2],
        flags=InitFlag(low | high << 32 if low & InitFlag.EXTENDED else low),
        max_background=fields[4],
        congestion_threshold=fields[5],
        max_write=fields[6],
        time_granularity=fields[7],
        max_pages=fields[8],
        map_alignment=fields[9],
        later=fields[11],
    )


def allow_idmap(reply: InitReply, request: InitRequest) -> InitReply:
    """The reply that also allows idmapped mounts, if the kernel has offered them.

    The mount must have `default_permissions`, else the kernel gives it up. From then on requests
    that create nothing tell no caller: their uid and gid are -1.
    """
    if InitFlag.ALLOW_IDMAP not in request.flags:
        return reply
    return replace(reply, flags=reply.flags | InitFlag.EXTENDED | InitFlag.ALLOW_IDMAP)


def refuse_async_direct(reply: InitReply) -> InitReply:
    """The reply that has the kernel send one request after the other for a read with O_DIRECT.

    For several at once it waits in a way that no signal ends, SIGKILL included (fuse_direct_IO):
    such a reader would stay for as long as no daemon runs.
    """
    # Not `& ~`, which takes away all flags that have no name here.
    return replace(reply, flags=reply.flags ^ reply.flags & InitFlag.ASYNC_DIO)


def allow_background(reply: InitReply, most: int) -> InitReply:
    """The reply by which the kernel may have so many requests in flight that nobody waits for."""
    return replace(reply, max_background=most, congestion_threshold=most * 3 // 4)


def take_up(reply: InitReply, request: InitRequest) -> InitReply:
    """The reply that also takes what the kernel offers, libfuse does not, and costs nothing here.

    That is to remember targets of symlinks, and to look several names up in one directory at once.
    Without the latter, who waits for the next one's answer cannot be killed (fuse_lock_inode).
    """
    taken = InitFlag.CACHE_SYMLINKS | InitFlag.PARALLEL_DIROPS
    return replace(reply, flags=reply.flags | request.flags & taken)


def _split(flags: InitFlag) -> tuple[int, int]:
    """The fields `flags` and `flags2`."""
    return flags & 0xFFFF_FFFF, flags >> 32 if InitFlag.EXTENDED in flags else 0


def _check_size(what: str, message: bytes, least: int) -> None:
    if len(message) < least:
        raise HandshakeError(f"{what} has {len(message)} bytes instead of {least}")
    (length,) = struct.unpack_from("=I", message)
    if length != len(message):
        raise HandshakeError(f"{what} has {len(message)} bytes and says that it has {length}")


def _check_major(who: str, major: int) -> None:
    if major != _MAJOR:
        raise HandshakeError(f"{who} speaks FUSE {major}, FirstByte speaks FUSE {_MAJOR}")
