"""FUSE messages: what the kernel asks, and what it is answered.

Bytes in, values out, no I/O. Layouts, names and numbers are those of the kernel's
include/uapi/linux/fuse.h (protocol 7.45, Linux 6.18); all fields are in the byte order of the
machine. FUSE_INIT is in `handshake`.

    request:  fuse_in_header (40 bytes)   what the opcode says
    reply:    fuse_out_header (16 bytes)  nothing after an error, else what the opcode says
"""

from __future__ import annotations

import enum
import struct
from typing import TYPE_CHECKING

from index.erofs.layout import NANOSECONDS, encode_device

if TYPE_CHECKING:
    from index.erofs.reader import Inode

ROOT = 1
"""FUSE_ROOT_ID: the number of the mount's root."""

MAX_TRANSFER = 1 << 20
"""Bytes of data in the largest message: 256 pages, which is what libfuse agrees to."""

FOR_EVER = 1 << 32
"""Seconds that the kernel may believe an answer that never changes. It counts 64 bits of jiffies,
and is not to overflow them."""

BLOCK = 4096
"""The preferred size of small reads, in bytes."""

_SECTOR = 512  # the unit of st_blocks, whatever a file system's blocks are


class Opcode(enum.IntEnum):
    """Requests that something here knows; there are more."""

    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    MKNOD = 8
    RMDIR = 11
    OPEN = 14
    READ = 15
    RELEASE = 18
    GETXATTR = 22
    INIT = 26
    OPENDIR = 27
    RELEASEDIR = 29
    CREATE = 35
    INTERRUPT = 36
    IOCTL = 39
    BATCH_FORGET = 42
    READDIRPLUS = 44


class OpenFlag(enum.IntFlag):
    """FOPEN_*: what the kernel may do with an open file or directory."""

    KEEP_CACHE = 1 << 1
    CACHE_DIR = 1 << 3


# fuse_in_header
#
#   offset size field
#   0      4    length of the whole message
#   4      4    opcode
#   8      8    unique: the number to be answered
#   16     8    nodeid: the inode it is about
#   24     4    uid     \
#   28     4    gid      > of the caller; -1 on idmapped mounts, as the kernel checks permissions
#   32     4    pid     /  its thread, in the process namespace of who mounted; 0 if not in there
#   36     2    length of extensions, in 8 bytes
#   38     2    padding
IN_HEADER = struct.Struct("=IIQQIIIHH")
REQUEST = struct.Struct("=4xIQQ")
"""Opcode, unique and nodeid of a request."""
THREAD = struct.Struct("=32xI")
"""The pid of a request."""

# fuse_out_header
#
#   offset size field
#   0      4    length of the whole message
#   4      4    0, or the negative errno; in a notification its code
#   8      8    unique of the request; 0 in a notification
OUT_HEADER = struct.Struct("=IiQ")

RESENT = 1 << 63
"""FUSE_UNIQUE_RESEND: set in the unique of a request that is delivered again (Linux 6.9). Without
it, no two requests of a connection have the same."""

CHANGED_NAME = {Opcode.CREATE: 16, Opcode.MKNOD: 16, Opcode.RMDIR: 0}
"""Where the name begins, after the header, of what is to be made or removed; a zero byte ends it.
What comes before is fuse_create_in, fuse_mknod_in (protocol 7.12)."""

# What comes after the header of a request
#
#   LOOKUP       name, NUL
#   OPEN         flags of open(2) 4, of FUSE 4                                  fuse_open_in
#   READ         handle 8, offset 8, size 4, flags 4, lock owner 8, flags 4, padding 4
#   READDIRPLUS  the same; the offset is 0 or that of an entry                  fuse_read_in
#   GETXATTR     size 4, padding 4, name, NUL                                   fuse_getxattr_in
#   INTERRUPT    unique 8 of the request that is no longer wanted               fuse_interrupt_in
OPEN_IN = struct.Struct("=I4x")
READ_IN = struct.Struct("=8xQI")
HANDLE = struct.Struct("=Q")
INTERRUPT_IN = struct.Struct("=Q")

# fuse_attr
#
#   offset size field
#   0      8    inode
#   8      8    size in bytes
#   16     8    512-byte blocks
#   24     24   seconds of atime, mtime, ctime since the epoch; signed, whatever fuse.h says
#   48     12   nanoseconds of the three
#   60     4    mode, as in stat(2)
#   64     4    link count
#   68     8    uid, gid
#   76     4    device, as new_encode_dev makes it
#   80     4    preferred size of small reads
#   84     4    flags
_ATTRIBUTES = "QQQqqqIIIIIIIIII"
# fuse_attr_out: seconds that the attributes hold 8, nanoseconds 4, padding 4; then fuse_attr
_ATTRIBUTES_REPLY = struct.Struct("=IiQ QI4x" + _ATTRIBUTES)
# fuse_entry_out: nodeid 8, generation 8, seconds that the name holds 8, that the attributes hold 8,
# nanoseconds of both 4 + 4; then fuse_attr
_ENTRY = struct.Struct("=QQQQII" + _ATTRIBUTES)
_ENTRY_REPLY = struct.Struct("=IiQ QQQQII" + _ATTRIBUTES)
# fuse_open_out: handle 8, flags 4, padding 4
_OPEN_REPLY = struct.Struct("=IiQ QI4x")
# fuse_direntplus: fuse_entry_out, fuse_attr; then fuse_dirent: inode 8, offset of what follows 8,
# bytes of the name 4, type 4, the name, zeros up to a multiple of 8 bytes
_DIRENT = struct.Struct("=QQII")
_UNTOLD = bytes(_ENTRY.size)
_LISTED_SIZE = len(_UNTOLD) + _DIRENT.size
_NO_ATTRIBUTES = (0,) * len(_ATTRIBUTES)
_ALIGNMENT = 8
_TYPE_SHIFT = 12  # from a mode to a type of directory entry, as readdir(3) gives it


def error_reply(unique: int, error: int) -> bytes:
    """`error` is an errno; 0 is success, and nothing to tell."""
    return OUT_HEADER.pack(OUT_HEADER.size, -error, unique)


def attributes_reply(unique: int, number: int, inode: Inode, *, seconds: int) -> bytes:
    """To GETATTR of the mount's inode `number`. It holds for `seconds`."""
    size = _ATTRIBUTES_REPLY.size
    return _ATTRIBUTES_REPLY.pack(size, 0, unique, seconds, 0, *_attributes(number, inode))


def entry_reply(unique: int, number: int, inode: Inode, *, seconds: int) -> bytes:
    """To LOOKUP of a name that there is, for `seconds`. What it names stays as it is for ever."""
    size, attributes = _ENTRY_REPLY.size, _attributes(number, inode)
    return _ENTRY_REPLY.pack(size, 0, unique, number, 0, seconds, FOR_EVER, 0, 0, *attributes)


def absent_reply(unique: int) -> bytes:
    """To LOOKUP of a name that there never will be: inode 0, which may be remembered."""
    return _ENTRY_REPLY.pack(_ENTRY_REPLY.size, 0, unique, 0, 0, FOR_EVER, 0, 0, 0, *_NO_ATTRIBUTES)


def _attributes(number: int, inode: Inode) -> tuple[int, ...]:
    """The fields of fuse_attr."""
    seconds, nanoseconds = divmod(inode.mtime_ns, NANOSECONDS)
    return (
        number,
        inode.size,
        -(-inode.size // _SECTOR),
        seconds,
        seconds,
        seconds,
        nanoseconds,
        nanoseconds,
        nanoseconds,
        inode.mode,
        inode.nlink,
        inode.uid,
        inode.gid,
        encode_device(*inode.rdev),
        BLOCK,
        0,
    )


def open_reply(unique: int, handle: int, flags: OpenFlag) -> bytes:
    """To OPEN and OPENDIR."""
    return _OPEN_REPLY.pack(_OPEN_REPLY.size, 0, unique, handle, flags)


def data_header(unique: int, size: int) -> bytes:
    """What comes before `size` bytes of data, in the answer to READ."""
    return OUT_HEADER.pack(OUT_HEADER.size + size, 0, unique)


class Listing:
    """The answer to READDIRPLUS, put together: as many entries as fit."""

    def __init__(self, unique: int, size: int) -> None:
        """`size` in bytes, without the header."""
        self._unique = unique
        self._room = size
        self._parts: list[bytes] = []

    def add(self, name: bytes, number: int, inode: Inode, following: int) -> bool:
        """Add an entry that is a LOOKUP at the same time and holds for ever; False if it is full.

        `following` is the offset at which a listing goes on after this entry.
        """
        attributes = _attributes(number, inode)
        entry = _ENTRY.pack(number, 0, FOR_EVER, FOR_EVER, 0, 0, *attributes)
        return self._add(entry, name, number, inode.mode, following)

    def add_name(self, name: bytes, number: int, mode: int, following: int) -> bool:
        """Add an entry of which nothing is told but that it is there: `.` and `..`."""
        return self._add(_UNTOLD, name, number, mode, following)

    def _add(self, entry: bytes, name: bytes, number: int, mode: int, following: int) -> bool:
        length = len(name)
        padding = -length % _ALIGNMENT
        self._room -= _LISTED_SIZE + length + padding
        if self._room < 0:
            return False
        tail = _DIRENT.pack(number, following, length, mode >> _TYPE_SHIFT)
        self._parts += (entry, tail, name, bytes(padding))
        return True

    def reply(self) -> bytes:
        """The message; a listing is over when nothing was added to it."""
        body = b"".join(self._parts)
        return data_header(self._unique, len(body)) + body
