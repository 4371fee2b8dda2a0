"""Hand-made tars: every byte of a header is ours, so that tests can write what libraries refuse.

`tar(file(b"a", b"data"), directory(b"d"), ...)` makes a layer; raw bytes among the members are put
in as they are.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

BLOCK = 512
SECOND = 1_000_000_000
END = bytes(2 * BLOCK)

USTAR = b"ustar\x0000"
GNU = b"ustar  \0"
V7 = bytes(8)

CAPABILITY = struct.pack("<IIIII", 0x0200_0001, 1 << 13, 0, 0, 0)
"""A valid `security.capability` of version 2: cap_net_raw+ep."""


@dataclass(frozen=True)
class Member:
    """A tar member. `size` is what the header says (the data's length if None)."""

    name: bytes
    kind: bytes = b"0"
    data: bytes = b""
    mode: int = 0o644
    uid: int = 0
    gid: int = 0
    mtime_ns: int = 1_600_000_000 * SECOND
    linkname: bytes = b""
    major: int = 0
    minor: int = 0
    xattrs: dict[bytes, bytes] = field(default_factory=dict)
    size: int | None = None
    gnu: bool = False  # long names, large numbers the GNU way rather than in PAX records
    pax: tuple[tuple[bytes, bytes], ...] = ()  # records besides those that are needed


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % BLOCK)


def octal(value: int, width: int) -> bytes:
    return b"%0*o\0" % (width - 1, value)


def base256(value: int, width: int) -> bytes:
    """GNU's numbers: two's complement with the first bit set."""
    number = value & ((1 << (8 * width - 1)) - 1)
    return (number | 1 << (8 * width - 1)).to_bytes(width, "big")


def header(
    name: bytes = b"file",
    kind: bytes = b"0",
    *,
    mode: bytes = b"0000644\0",
    uid: bytes = b"0000000\0",
    gid: bytes = b"0000000\0",
    size: bytes = b"00000000000\0",
    mtime: bytes = b"00000000000\0",
    checksum: bytes | None = None,
    linkname: bytes = b"",
    magic: bytes = USTAR,
    major: bytes = b"0000000\0",
    minor: bytes = b"0000000\0",
    prefix: bytes = b"",
    tail: bytes = b"",
) -> bytes:
    """One header block of raw fields; the checksum is right unless given."""
    names = bytes(64)
    fields = (name, mode, uid, gid, size, mtime, b" " * 8, kind)
    widths = (100, 8, 8, 8, 12, 12, 8, 1)
    block = b"".join(value.ljust(n, b"\0") for value, n in zip(fields, widths, strict=True))
    block += linkname.ljust(100, b"\0") + magic + names + major + minor
    block += prefix.ljust(155, b"\0") + tail.ljust(12, b"\0")
    assert len(block) == BLOCK
    if checksum is None:
        checksum = b"%06o\0 " % sum(block)
    return block[:148] + checksum + block[156:]


def pax_record(key: bytes, value: bytes) -> bytes:
    body = b" " + key + b"=" + value + b"\n"
    length = len(body)
    while length != len(body) + len(b"%d" % length):
        length = len(body) + len(b"%d" % length)
    return b"%d" % length + body


def pax_header(*records: tuple[bytes, bytes], kind: bytes = b"x") -> bytes:
    data = b"".join(pax_record(key, value) for key, value in records)
    return header(b"PaxHeaders/0", kind, size=octal(len(data), 12)) + padded(data)


def gnu_long(kind: bytes, name: bytes) -> bytes:
    """GNU's header of type L (name) or K (link target)."""
    data = name + b"\0"
    return header(b"././@LongLink", kind, size=octal(len(data), 12), magic=GNU) + padded(data)


def encode(member: Member) -> bytes:
    """A member's headers and data, with extensions where the plain header does not suffice."""
    records = [(b"SCHILY.xattr." + name, value) for name, value in member.xattrs.items()]
    records += member.pax
    size = len(member.data) if member.size is None else member.size
    seconds, fraction = divmod(member.mtime_ns, SECOND)
    before = b""

    def number(value: int, width: int, key: bytes) -> bytes:
        if 0 <= value < 8 ** (width - 1):
            return octal(value, width)
        if member.gnu:
            return base256(value, width)
        records.append((key, b"%d" % value))
        return octal(0, width)

    uid, gid = number(member.uid, 8, b"uid"), number(member.gid, 8, b"gid")
    size_field = number(size, 12, b"size")
    if fraction and not member.gnu:
        sign = b"-" if member.mtime_ns < 0 else b""
        whole, rest = divmod(abs(member.mtime_ns), SECOND)
        records.append((b"mtime", b"%s%d.%09d" % (sign, whole, rest)))
        mtime = octal(max(seconds, 0), 12)
    else:
        mtime = number(seconds, 12, b"mtime")
    if len(member.name) > 100:
        if member.gnu:
            before += gnu_long(b"L", member.name)
        else:
            records.append((b"path", member.name))
    if len(member.linkname) > 100:
        if member.gnu:
            before += gnu_long(b"K", member.linkname)
        else:
            records.append((b"linkpath", member.linkname))
    if records:
        before = pax_header(*records) + before
    return (
        before
        + header(
            member.name[:100],
            member.kind,
            mode=octal(member.mode, 8),
            uid=uid,
            gid=gid,
            size=size_field,
            mtime=mtime,
            linkname=member.linkname[:100],
            magic=GNU if member.gnu else USTAR,
            major=octal(member.major, 8),
            minor=octal(member.minor, 8),
        )
        + padded(member.data)
    )


def tar(*members: Member | bytes) -> bytes:
    """An archive of these members."""
    return b"".join(m if isinstance(m, bytes) else encode(m) for m in members) + END


def file(name: bytes, data: bytes = b"", **fields: Any) -> Member:
    return Member(name, b"0", data, **fields)


def directory(name: bytes, *, mode: int = 0o755, **fields: Any) -> Member:
    return Member(name, b"5", mode=mode, **fields)


def symlink(name: bytes, target: bytes, **fields: Any) -> Member:
    return Member(name, b"2", mode=0o777, linkname=target, **fields)


def hardlink(name: bytes, target: bytes, **fields: Any) -> Member:
    return Member(name, b"1", linkname=target, **fields)


def device(name: bytes, kind: bytes, major: int, minor: int, **fields: Any) -> Member:
    """`kind` is b"3" for a character device and b"4" for a block device."""
    return Member(name, kind, major=major, minor=minor, **fields)


def fifo(name: bytes, **fields: Any) -> Member:
    return Member(name, b"6", **fields)


def whiteout(path: bytes) -> Member:
    """Hides `path` of lower layers."""
    parent, slash, name = path.rpartition(b"/")
    return Member(parent + slash + b".wh." + name)


def opaque(path: bytes) -> Member:
    """Hides all that lower layers have in the directory `path`."""
    return Member(path + b"/.wh..wh..opq")


def sparse_old(name: bytes, size: int, runs: Sequence[tuple[int, bytes]]) -> bytes:
    """A sparse file in GNU's old format: type S, 4 entries in the header, then 21 a block."""
    entries = [octal(offset, 12) + octal(len(data), 12) for offset, data in runs]
    data = b"".join(data for _, data in runs)
    block = bytearray(header(name, b"S", size=octal(len(data), 12), magic=GNU))
    block[386:482] = b"".join(entries[:4]).ljust(96, b"\0")
    block[482] = len(entries) > 4
    block[483:495] = octal(size, 12) if size < 8**11 else base256(size, 12)
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    rest = entries[4:]
    while rest:
        block += b"".join(rest[:21]).ljust(504, b"\0") + bytes([len(rest) > 21]) + bytes(7)
        rest = rest[21:]
    return bytes(block) + padded(data)


def sparse_pax(
    name: bytes, size: int, runs: Sequence[tuple[int, bytes]], version: str = "1.0"
) -> bytes:
    """A sparse file in one of GNU's PAX formats: 0.0, 0.1 or 1.0."""
    data = b"".join(data for _, data in runs)
    numbers = [number for offset, run in runs for number in (offset, len(run))]
    if version == "1.0":
        lines = [len(runs), *numbers]
        data = padded(b"".join(b"%d\n" % line for line in lines)) + data
        records = [
            (b"GNU.sparse.major", b"1"),
            (b"GNU.sparse.minor", b"0"),
            (b"GNU.sparse.name", name),
            (b"GNU.sparse.realsize", b"%d" % size),
        ]
    else:
        records = [(b"GNU.sparse.size", b"%d" % size), (b"GNU.sparse.numblocks", b"%d" % len(runs))]
        if version == "0.0":
            for offset, run in runs:
                records.append((b"GNU.sparse.offset", b"%d" % offset))
                records.append((b"GNU.sparse.numbytes", b"%d" % len(run)))
        else:
            records.append((b"GNU.sparse.map", b",".join(b"%d" % number for number in numbers)))
    shown = b"GNUSparseFile.0/file" if version == "1.0" else name
    return encode(Member(shown, data=data, pax=tuple(records)))
