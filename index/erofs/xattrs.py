"""Extended attributes in an EROFS image: written with an inode or shared, and read back.

A value that several inodes have is kept once, in the shared area, when that makes the image
smaller; the choice depends on the tree alone.
"""

from __future__ import annotations

from collections import Counter
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

from index.erofs.layout import (
    XATTR_BODY,
    XATTR_BODY_MAX,
    XATTR_ENTRY,
    XATTR_NAME_MAX,
    XATTR_PREFIXES,
    XATTR_SHARED_ID,
    XATTR_SHARED_MAX,
    XATTR_UNIT,
    XATTR_VALUE_MAX,
    XATTR_WHOLE_NAMES,
    align,
)
from index.errors import FormatError, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from index.erofs.reader import Buffer


class SharedXattrs:
    """The shared area of an image that is being written."""

    def __init__(self, inodes: Iterable[Mapping[bytes, bytes]]) -> None:
        """Choose what to share, given the xattrs of every inode that has some."""
        uses = Counter(item for xattrs in inodes for item in xattrs.items())
        entries: dict[tuple[bytes, bytes], bytes] = {}
        for item, count in uses.items():
            if count > 1:
                with suppress(UnsupportedError):  # `body` raises it, when the path is known
                    entries[item] = _encode(*item)
        worthwhile = (
            item
            for item, entry in entries.items()
            if len(entry) + uses[item] * XATTR_SHARED_ID.size < uses[item] * len(entry)
        )
        self._ids: dict[tuple[bytes, bytes], int] = {}
        area = bytearray()
        for item in sorted(worthwhile):
            self._ids[item] = len(area) // XATTR_UNIT
            area += entries[item]
        self.area = bytes(area)

    def body(self, xattrs: Mapping[bytes, bytes]) -> bytes:
        """The xattr body of an inode; empty without xattrs.

        Raises UnsupportedError for what EROFS cannot hold.
        """
        if not xattrs:
            return b""
        shared: list[int] = []
        entries: list[bytes] = []
        for item in sorted(xattrs.items()):
            shared_id = self._ids.get(item)
            if shared_id is not None and len(shared) < XATTR_SHARED_MAX:
                shared.append(shared_id)
            else:
                entries.append(_encode(*item))
        body = b"".join(
            (XATTR_BODY.pack(len(shared)), *map(XATTR_SHARED_ID.pack, shared), *entries)
        )
        if len(body) > XATTR_BODY_MAX:
            raise UnsupportedError(
                f"{len(body)} bytes of extended attributes; EROFS holds {XATTR_BODY_MAX} an inode"
            )
        return body


def _encode(name: bytes, value: bytes) -> bytes:
    for index, prefix in XATTR_PREFIXES.items():
        if name.startswith(prefix):
            suffix = name[len(prefix) :]
            if bool(suffix) != (index in XATTR_WHOLE_NAMES):
                break
    else:
        raise UnsupportedError(f"extended attribute {name!r} is in no namespace of Linux")
    if len(name) > XATTR_NAME_MAX or b"\0" in name:
        raise UnsupportedError(f"extended attribute {name!r} has a name that Linux does not allow")
    if len(value) > XATTR_VALUE_MAX:
        raise UnsupportedError(
            f"extended attribute {name!r} has {len(value)} bytes; EROFS holds {XATTR_VALUE_MAX}"
        )
    entry = XATTR_ENTRY.pack(len(suffix), index, len(value)) + suffix + value
    return entry.ljust(align(len(entry), XATTR_UNIT), b"\0")


class Xattr(NamedTuple):
    """A name and where in the image its value is, in bytes."""

    name: bytes
    start: int
    end: int


def parse(image: Buffer, start: int, end: int, shared_area: int) -> Iterator[Xattr]:
    """Yield the xattrs whose body is `image[start:end]`; the shared area starts at `shared_area`.

    Raises FormatError for entries out of bounds, unknown prefixes, and names that Linux does not
    allow. `start` and `end` must be in the image.
    """
    if end - start < XATTR_BODY.size:
        raise FormatError(f"xattr body of {end - start} bytes")
    (shared,) = XATTR_BODY.unpack_from(image, start)
    position = start + XATTR_BODY.size + shared * XATTR_SHARED_ID.size
    if position > end:
        raise FormatError(f"xattr body of {end - start} bytes with {shared} shared entries")
    for at in range(start + XATTR_BODY.size, position, XATTR_SHARED_ID.size):
        (shared_id,) = XATTR_SHARED_ID.unpack_from(image, at)
        yield _entry(image, shared_area + shared_id * XATTR_UNIT, len(image))
    while position < end:
        xattr = _entry(image, position, end)
        yield xattr
        position = align(xattr.end, XATTR_UNIT)


def _entry(image: Buffer, position: int, end: int) -> Xattr:
    name_start = position + XATTR_ENTRY.size
    if name_start > end:
        raise FormatError(f"xattr entry at {position} runs past {end}")
    name_size, index, value_size = XATTR_ENTRY.unpack_from(image, position)
    value_start = name_start + name_size
    if value_start + value_size > end:
        raise FormatError(f"xattr entry at {position} runs past {end}")
    prefix = XATTR_PREFIXES.get(index)
    if prefix is None:
        raise FormatError(f"xattr entry at {position} has unknown prefix {index}")
    name = prefix + bytes(image[name_start:value_start])
    if (
        (name_size == 0) != (index in XATTR_WHOLE_NAMES)
        or len(name) > XATTR_NAME_MAX
        or b"\0" in name
    ):
        raise FormatError(f"xattr entry at {position} has the name {name!r}")
    return Xattr(name, value_start, value_start + value_size)
