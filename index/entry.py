"""One member of a layer's tar, after PAX, GNU and old headers have been resolved."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field


class EntryType(enum.Enum):
    """The kinds of tar members that make something in a tree."""

    REGULAR = "regular"
    DIRECTORY = "directory"
    SYMLINK = "symlink"
    HARDLINK = "hardlink"
    CHARACTER = "character device"
    BLOCK = "block device"
    FIFO = "fifo"


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of a file's bytes that lies contiguously in the layer's raw space.

    `file_offset` and `raw_offset` are in bytes; `length` > 0. What no segment covers is a hole.
    """

    file_offset: int
    raw_offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Entry:
    """A tar member. Paths are bytes exactly as in the archive (not cleaned).

    `size` is the file's size as a reader sees it (sparse files: expanded). `mtime_ns` is in
    nanoseconds since the epoch and may be negative. `xattrs` are full names to values.
    """

    name: bytes
    type: EntryType
    mode: int = 0o644  # permission bits with setuid, setgid and sticky; 0 … 0o7777
    uid: int = 0
    gid: int = 0
    size: int = 0
    mtime_ns: int = 0
    linkname: bytes = b""
    major: int = 0
    minor: int = 0
    xattrs: dict[bytes, bytes] = field(default_factory=dict)
    segments: tuple[Segment, ...] = ()
    # Data of sparse segments that do not start on a 512-byte boundary both in the file and in raw
    # space, by file offset: such bytes cannot be addressed by blocks and travel inside the index.
    embedded: tuple[tuple[int, bytes], ...] = ()
