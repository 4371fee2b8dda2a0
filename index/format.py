"""The file index as bytes: a versioned header, a table of sections, and the sections.

Two forms of the same index share one layout. As it *travels*, sections are zstd-compressed. On a
node it is *expanded*: sections lie uncompressed on page boundaries, are mapped, and are read in
place, so that opening does no work per file. docs/file-index-format.md is this module in prose.

All integers are little-endian.
"""

from __future__ import annotations

import enum
import hashlib
import os
import struct
from array import array
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import zstandard
from isal.isal_zlib import crc32

from index.errors import FormatError, IntegrityError, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from index.tables import LayerTable

_Piece = TypeVar("_Piece")

MAGIC = b"\x89FBX\r\n\x1a\n"  # like PNG's: a text-mode copy or a 7-bit channel breaks it visibly
VERSION_MAJOR = 1  # a reader refuses any other
VERSION_MINOR = 0  # a reader ignores it

# magic, major, minor, incompatible feature bits, compatible feature bits, sections, file size
HEADER = struct.Struct("<8sHHIIIQ")
# id, encoding, offset, stored size, raw size, digest of the raw bytes
SECTION = struct.Struct("<IIQQQ32s")
# blob digest, diffID, blob size, raw size, codec, seek points, windows, reserved (0)
LAYER = struct.Struct("<32s32sQQIIII")
WINDOW_LENGTH = struct.Struct("<I")
_CHECKSUM = struct.Struct("<I")

OPTIONAL_SECTION = 1 << 31  # set in the id of a section that a reader may pass over
# In the expanded form alone: a u32 CRC-32 of each section's stored bytes, by ascending id.
CHECKSUMS = OPTIONAL_SECTION | 1
MAX_SECTIONS = 64
WINDOW_SIZE = 32 << 10  # the reach of deflate (RFC 1951, 2)
DIGEST_PIECE = 4 << 20  # sections are hashed in pieces of this size, so that all cores can help
PAGE = 4096
# The most that an index from outside may unfold to: 16 million files at 128 bytes each.
MAX_EXPANDED = 2 << 30
ZSTD_LEVEL = 15
# 0.3 ms a window. Level 12 takes 0.9 ms and saves 0.3 %; level 19 takes 11.4 ms, as long as
# inflating what lies between two windows, and saves 3.7 %.
WINDOW_LEVEL = 9


class Section(enum.IntEnum):
    """What a section holds. The values are part of the format."""

    TREE = 1  # the EROFS image
    LAYERS = 2  # one LAYER row a layer, lowest first
    SEEK = 3  # columns over all layers: u64 raw offsets, u64 bit offsets, u8 window flags
    DIGESTS = 4  # one SHA-256 a chunk, over all layers
    WINDOWS = 5  # the 32 KiB before each gzip seek point that needs them, over all layers


class Encoding(enum.IntEnum):
    """How a section's bytes are stored. The values are part of the format."""

    PLAIN = 0
    ZSTD = 1  # one frame
    WINDOWS = 2  # a u32 length for each 32 KiB window, then one zstd frame for each


@dataclass(frozen=True, slots=True)
class Stored:
    """A section as it lies in a file, with the size and digest of its raw bytes."""

    encoding: Encoding
    data: bytes | memoryview
    raw_size: int
    digest: bytes


def section_digest(raw: bytes | memoryview) -> bytes:
    """SHA-256 over the SHA-256 of each 4 MiB piece."""
    view = memoryview(raw)
    pieces = [view[at : at + DIGEST_PIECE] for at in range(0, len(view), DIGEST_PIECE)]
    return _digest(_sha256, pieces)


def _windows_digest(stored: Stored) -> bytes:
    """The section digest of windows. There is no more than one of them in memory for each core."""
    frames = window_frames(stored)
    step = DIGEST_PIECE // WINDOW_SIZE
    pieces = [frames[at : at + step] for at in range(0, len(frames), step)]
    return _digest(_sha256_of_windows, pieces)


def _digest(hash_piece: Callable[[_Piece], bytes], pieces: Sequence[_Piece]) -> bytes:
    if len(pieces) > 1:  # the tree of 1 000 000 files takes one core 70 ms
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            hashed = list(pool.map(hash_piece, pieces))
    else:
        hashed = [hash_piece(piece) for piece in pieces]
    return _sha256(b"".join(hashed))


def _sha256_of_windows(frames: Sequence[memoryview]) -> bytes:
    hasher = hashlib.sha256()
    decompressor = zstandard.ZstdDecompressor()
    for frame in frames:
        hasher.update(decompress(frame, WINDOW_SIZE, decompressor))
    return hasher.digest()


def _sha256(data: bytes | memoryview) -> bytes:
    return hashlib.sha256(data).digest()


def index_digest(content: Mapping[Section, Stored]) -> bytes:
    """The index's own digest: 32 bytes that are equal for every form of the same index.

    It covers each section's id, raw size and digest, and nothing of how they are compressed,
    because no compressor promises the same bytes from one version to the next.
    """
    hasher = hashlib.sha256(MAGIC + struct.pack("<H", VERSION_MAJOR))
    for section in sorted(content):
        stored = content[section]
        hasher.update(struct.pack("<IQ", section, stored.raw_size) + stored.digest)
    return hasher.digest()


def lay_out(
    tree: bytes, layers: Sequence[LayerTable], windows: Sequence[Sequence[bytes]]
) -> dict[Section, Stored]:
    """All sections of a new index, not yet compressed but for the windows.

    `windows` holds each layer's windows in the order of its seek points.
    """
    raw_offsets, bit_offsets, flags = array("Q"), array("Q"), bytearray()
    rows: list[bytes] = []
    for table, held in zip(layers, windows, strict=True):
        raw_offsets.extend(table.raw_offsets)
        bit_offsets.extend(table.bit_offsets)
        flags += bytes(table.window_flags)
        points = len(table.raw_offsets)
        sizes = (table.blob_size, table.raw_size, table.codec, points, len(held), 0)
        rows.append(LAYER.pack(table.digest, table.diff_id, *sizes))
    plain = {
        Section.TREE: tree,
        Section.LAYERS: b"".join(rows),
        Section.SEEK: raw_offsets.tobytes() + bit_offsets.tobytes() + bytes(flags),
        Section.DIGESTS: b"".join(bytes(table.digests) for table in layers),
    }
    content = {
        section: Stored(Encoding.PLAIN, raw, len(raw), section_digest(raw))
        for section, raw in plain.items()
    }
    content[Section.WINDOWS] = _pack_windows([w for held in windows for w in held])
    return content


def _pack_windows(windows: Sequence[bytes]) -> Stored:
    padded = [window.rjust(WINDOW_SIZE, b"\0") for window in windows]
    compressor = zstandard.ZstdCompressor(level=WINDOW_LEVEL)
    frames = [compressor.compress(window) for window in padded]
    data = b"".join([*(WINDOW_LENGTH.pack(len(frame)) for frame in frames), *frames])
    digest = section_digest(b"".join(padded))
    return Stored(Encoding.WINDOWS, data, WINDOW_SIZE * len(padded), digest)


def compress(content: Mapping[Section, Stored]) -> dict[Section, Stored]:
    """The sections as they travel."""
    return {
        section: (
            Stored(
                Encoding.ZSTD,
                zstandard.compress(stored.data, ZSTD_LEVEL),
                stored.raw_size,
                stored.digest,
            )
            # digests do not compress, windows are compressed one by one
            if section not in (Section.DIGESTS, Section.WINDOWS)
            else stored
        )
        for section, stored in content.items()
    }


def write(content: Mapping[Section, Stored]) -> bytes:
    """The file in the form that `content` has: compressed as it travels, or plain."""
    return _write(sorted(content.items()), alignment=8)


def write_expanded(content: Mapping[Section, Stored]) -> bytes:
    """The file as a node keeps it, from sections that were verified just now.

    Its checksums notice what a disk does to it later at a tenth of a SHA-256's cost, which is
    what lets an index of 1 000 000 files open in 50 ms.
    """
    sums = b"".join(_CHECKSUM.pack(crc32(content[section].data)) for section in sorted(content))
    extra = Stored(Encoding.PLAIN, sums, len(sums), section_digest(sums))
    return _write([*sorted(content.items()), (CHECKSUMS, extra)], alignment=PAGE)


def _write(content: Sequence[tuple[int, Stored]], *, alignment: int) -> bytes:
    rows: list[bytes] = []
    parts: list[bytes | memoryview] = []
    end = HEADER.size + SECTION.size * len(content)
    for section, stored in content:
        padding = bytes(-end % alignment)
        size = len(stored.data)
        start = end + len(padding)
        end = start + size
        rows.append(
            SECTION.pack(section, stored.encoding, start, size, stored.raw_size, stored.digest)
        )
        parts += (padding, stored.data)
    header = HEADER.pack(MAGIC, VERSION_MAJOR, VERSION_MINOR, 0, 0, len(content), end)
    return b"".join((header, *rows, *parts))


def intact(file: bytes | memoryview, content: Mapping[Section, Stored]) -> bool:
    """Whether an expanded file is still what `write_expanded` wrote; False if it cannot tell.

    Says nothing about where the file comes from: what is from outside goes through `expand`.
    """
    rows = _rows(memoryview(file))
    sums = next((data for kind, _, _, data, _, _ in rows if kind == CHECKSUMS), b"")
    return bytes(sums) == b"".join(
        _CHECKSUM.pack(crc32(content[section].data)) for section in sorted(content)
    )


def read(file: bytes | memoryview) -> dict[Section, Stored]:
    """The sections of a file of either form, as views into it, not yet verified.

    Raises FormatError if it is no file index or breaks the layout, UnsupportedError if it is one
    of a version or with features this reader does not know.
    """
    content: dict[Section, Stored] = {}
    for kind, encoding, _, data, raw_size, digest in _rows(memoryview(file)):
        if kind & OPTIONAL_SECTION:
            continue
        try:
            section, how = Section(kind), Encoding(encoding)
        except ValueError:
            raise UnsupportedError(
                f"the file index has a section {kind} in encoding {encoding}",
                hint="a newer program made it; update this one, or build the index anew",
            ) from None
        if section in content:
            raise FormatError(f"the file index has section {section.name} twice")
        content[section] = Stored(how, data, raw_size, digest)
    if missing := [section.name for section in Section if section not in content]:
        raise FormatError(f"the file index has no section {missing[0]}")
    for section, stored in content.items():
        if (section is Section.WINDOWS) != (stored.encoding is Encoding.WINDOWS):
            raise FormatError(f"section {section.name} of the file index has a wrong encoding")
    return content


def places(file: bytes | memoryview) -> dict[int, range]:
    """Where in the file each section is, by its id. Raises as `read`; reads the header alone."""
    return {
        kind: range(offset, offset + len(data))
        for kind, _, offset, data, _, _ in _rows(memoryview(file))
    }


def _rows(view: memoryview) -> Iterator[tuple[int, int, int, memoryview, int, bytes]]:
    """Id, encoding, offset, stored bytes, raw size and digest of each section. Raises as `read`."""
    if len(view) < HEADER.size or bytes(view[: len(MAGIC)]) != MAGIC:
        raise FormatError("this is not a FirstByte file index")
    _, major, _, incompatible, _, count, size = HEADER.unpack_from(view)
    if major != VERSION_MAJOR or incompatible:
        raise UnsupportedError(
            f"the file index has version {major} and features {incompatible:#x}",
            hint=f"this program reads version {VERSION_MAJOR}; update it, or build the index anew",
        )
    if size != len(view):
        raise FormatError(f"the file index says it has {size} bytes but has {len(view)}")
    if count > MAX_SECTIONS or HEADER.size + count * SECTION.size > size:
        raise FormatError(f"the file index says it has {count} sections")
    floor = HEADER.size + count * SECTION.size
    for number in range(count):
        row = SECTION.unpack_from(view, HEADER.size + number * SECTION.size)
        kind, encoding, offset, stored_size, raw_size, digest = row
        if offset < floor or offset + stored_size > size:
            raise FormatError(f"section {kind} of the file index lies outside its place")
        floor = offset + stored_size
        yield kind, encoding, offset, view[offset:floor], raw_size, digest


def expand(
    content: Mapping[Section, Stored], *, limit: int = MAX_EXPANDED
) -> dict[Section, Stored]:
    """Decompress and verify every section, the windows too (which stay compressed one by one).

    Never unfolds to more than `limit` bytes. Raises FormatError or IntegrityError.
    """
    if sum(stored.raw_size for stored in content.values()) > limit:
        raise FormatError(f"the file index would unfold to more than {limit} bytes")
    result: dict[Section, Stored] = {}
    for section, stored in content.items():
        if section is Section.WINDOWS:
            digest = _windows_digest(stored)
            result[section] = stored
        else:
            raw = _unpack(section, stored)
            digest = section_digest(raw)
            result[section] = Stored(Encoding.PLAIN, raw, stored.raw_size, stored.digest)
        if digest != stored.digest:
            raise IntegrityError(f"section {section.name} of the file index is damaged")
    return result


def _unpack(section: Section, stored: Stored) -> bytes | memoryview:
    raw: bytes | memoryview
    if stored.encoding is Encoding.PLAIN:
        raw = stored.data
    else:
        raw = decompress(stored.data, stored.raw_size)
    if len(raw) != stored.raw_size:
        raise FormatError(f"section {section.name} of the file index has a wrong size")
    return raw


def decompress(
    frame: bytes | memoryview, size: int, decompressor: zstandard.ZstdDecompressor | None = None
) -> bytes:
    """One zstd frame that must hold exactly `size` bytes.

    A `decompressor` that was used before saves the 10 µs that making one takes.
    """
    if decompressor is None:
        decompressor = zstandard.ZstdDecompressor()
    try:
        if zstandard.get_frame_parameters(frame).content_size != size:
            raise FormatError("a section of the file index has a wrong size")
        return decompressor.decompress(frame, max_output_size=size, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise FormatError(f"a section of the file index is damaged ({error})") from error


def window_frames(stored: Stored) -> list[memoryview]:
    """Where each window's own zstd frame lies. Raises FormatError if the lengths do not add up."""
    count, rest = divmod(stored.raw_size, WINDOW_SIZE)
    view = memoryview(stored.data)
    position = WINDOW_LENGTH.size * count
    if rest or position > len(view):
        raise FormatError("the windows of the file index have a wrong size")
    frames: list[memoryview] = []
    for (length,) in WINDOW_LENGTH.iter_unpack(view[:position]):
        frames.append(view[position : position + length])
        position += length
    if position != len(view):
        raise FormatError("the windows of the file index have a wrong size")
    return frames
