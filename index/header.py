"""One tar header: a block of 512 bytes, and the PAX records that override its fields.

Sources: POSIX.1-2017, pax, "ustar Interchange Format"; GNU tar manual, "Basic Tar Format". Numbers
are octal text, or base 256 if the first bit of the field is set (GNU).

| offset | size | field |
|---|---|---|
| 0 | 100 | name, ends at the first NUL |
| 100, 108, 116 | 8 each | mode, uid, gid |
| 124, 136 | 12 each | size, mtime in seconds |
| 148 | 8 | checksum: sum of the block's bytes with these 8 taken as spaces |
| 156 | 1 | type |
| 157 | 100 | link target |
| 257 | 8 | magic and version: `ustar\\0` `00`, or `ustar  \\0` for GNU; anything else is V7 |
| 265, 297 | 32 each | user and group name, not used |
| 329, 337 | 8 each | device major and minor (not in V7) |
| 345 | 155 | prefix of the name (ustar; star 131 bytes; GNU has other fields here) |

Functions here raise ValueError; the scanner adds which member it was.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass, field

from index.pax import SECOND, XATTR_PREFIX, parse_integer, parse_time

BLOCK = 512
"""Bytes in a tar block."""

MAX_ID = 0xFFFF_FFFE
"""The largest user or group; 2^32 - 1 means "leave as it is" to chown(2)."""

_HEADER = struct.Struct("100s 8s 8s 8s 12s 12s 8s 1s 100s 8s 64x 8s 8s 155s 12x")
_CHECKSUM = slice(148, 156)
_CHECKSUM_AS_SPACES = 8 * ord(" ")

_MAGIC_USTAR = b"ustar\x0000"
_MAGIC_GNU = b"ustar  \0"
_STAR_TRAILER = slice(508, 512)
_STAR_MAGIC = b"tar\0"
_STAR_PREFIX = 131
_GNU_ATIME, _GNU_CTIME = slice(0, 12), slice(12, 24)  # of the prefix


@dataclass(slots=True)
class Header:
    """What a header says, as numbers. `size` is that of the stored data, in bytes."""

    name: bytes
    kind: bytes  # the type: one byte
    mode: int
    uid: int
    gid: int
    size: int
    mtime_ns: int
    linkname: bytes
    major: int = 0
    minor: int = 0
    is_gnu: bool = False
    xattrs: dict[bytes, bytes] = field(default_factory=dict)

    def override(self, records: list[tuple[bytes, bytes]]) -> dict[bytes, bytes]:
        """Apply PAX records; returns them by key, the last of each.

        As in Go's archive/tar an empty value leaves the field alone; but an extended attribute
        may be empty, as containerd has it.
        """
        pax = dict(records)
        for key, value in pax.items():
            if key.startswith(XATTR_PREFIX):
                self.xattrs[key[len(XATTR_PREFIX) :]] = value
            elif not value:
                continue
            elif key == b"path":
                self.name = value
            elif key == b"linkpath":
                self.linkname = value
            elif key == b"uid":
                self.uid = parse_integer(value)
            elif key == b"gid":
                self.gid = parse_integer(value)
            elif key == b"size":
                self.size = parse_integer(value)
            elif key == b"mtime":
                self.mtime_ns = parse_time(value)
        return pax

    def check_owner(self) -> None:
        if not (0 <= self.uid <= MAX_ID and 0 <= self.gid <= MAX_ID):
            raise ValueError(f"its owner {self.uid}:{self.gid} is out of range")


def parse_header(block: bytes) -> Header:
    """Parse a block that is not all zeros."""
    fields = _HEADER.unpack(block)
    name, mode, uid, gid, size, mtime, checksum = fields[:7]
    kind, linkname, magic, major, minor, prefix = fields[7:]
    if not _has_valid_checksum(block, checksum):
        raise ValueError("the header's checksum is wrong")
    header = Header(
        name.partition(b"\0")[0],
        kind,
        parse_number(mode) & 0o7777,
        parse_number(uid),
        parse_number(gid),
        parse_number(size),
        parse_number(mtime) * SECOND,
        linkname.partition(b"\0")[0],
    )
    if magic == _MAGIC_USTAR:
        if prefix[0]:
            is_star = block[_STAR_TRAILER] == _STAR_MAGIC
            _prepend(header, prefix[:_STAR_PREFIX] if is_star else prefix)
    elif magic == _MAGIC_GNU:
        header.is_gnu = True
        # Go before 1.8, with which many old images were made, put a ustar prefix into GNU headers;
        # it shows because what should be times are no numbers.
        if prefix[0] and prefix.isascii() and not _are_times(prefix):
            _prepend(header, prefix)
    else:
        return header
    if kind in (b"3", b"4"):
        header.major, header.minor = parse_number(major), parse_number(minor)
    return header


def parse_number(field: bytes) -> int:
    """A numeric field."""
    digits = field.strip(b" \0")
    if not digits.isdigit():
        if field[0] & 0x80:
            return _base256(field)
        digits = digits.partition(b"\0")[0] or b"0"
        if not digits.isdigit():
            raise ValueError(f"the header has {field!r} where an octal number belongs")
    try:
        return int(digits, 8)
    except ValueError:
        raise ValueError(f"the header has {field!r} where an octal number belongs") from None


def _base256(field: bytes) -> int:
    """Two's complement, big-endian; the first bit only marks the format."""
    bits = 8 * len(field) - 1
    value = int.from_bytes(field, "big") - (1 << bits)
    return value - (1 << bits) if value >> (bits - 1) else value


def _prepend(header: Header, prefix: bytes) -> None:
    header.name = prefix.partition(b"\0")[0] + b"/" + header.name


def _are_times(gnu_fields: bytes) -> bool:
    try:
        parse_number(gnu_fields[_GNU_ATIME])
        parse_number(gnu_fields[_GNU_CTIME])
    except ValueError:
        return False
    return True


def _has_valid_checksum(block: bytes, field: bytes) -> bool:
    # The low half of Adler-32 is one more than the sum of the bytes, modulo 65521, so for half a
    # block (at most 65280) it is exact; and it is several times faster than sum().
    total = (zlib.adler32(block[:256]) & 0xFFFF) + (zlib.adler32(block[256:]) & 0xFFFF) - 2
    total += _CHECKSUM_AS_SPACES - sum(field)
    expected = parse_number(field)
    if total == expected:
        return True
    # Some old programs added the bytes up as signed numbers.
    rest = block[: _CHECKSUM.start] + block[_CHECKSUM.stop :]
    return total - 256 * sum(byte >> 7 for byte in rest) == expected
