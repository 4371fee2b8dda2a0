"""The file index of an image's lower layers, made from the image's own.

What tells about layers comes first in its columns, and is cut off there. The tree of the lower
layers is another one than the image's: upper layers may have hidden, replaced or described anew
what is in it, so it is merged again from the entries of the layers' tars.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from index import format as fbx
from index.erofs import writer
from index.errors import about
from index.file import FileIndex
from index.format import Encoding, Section, Stored
from index.merge import Merger
from index.tables import DIGEST_SIZE

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from index.entry import Entry
    from index.tables import LayerTable


def cut(index: FileIndex, layers: Sequence[Iterable[Entry]]) -> FileIndex:
    """The index of the image's lower layers, as many as there are entries of, the lowest first.

    It is the one that a build from their blobs would give, with the same digest. Raises TarError
    or UnsupportedError, with the layer's digest, if entries cannot be applied, UnsupportedError if
    an EROFS image cannot hold the tree, and FormatError if a window is damaged.
    """
    tables = index.layers[: len(layers)]
    if len(tables) != len(layers):
        raise ValueError(f"{len(layers)} layers of an image that has {len(index.layers)}")
    merger = Merger()
    for number, (table, entries) in enumerate(zip(tables, layers, strict=True)):
        with about(str(table)):
            merger.apply(number, entries)
    tree = writer.write(merger.finish(), [table.raw_size for table in tables])
    sections = fbx.read(index.expanded)
    content = {
        Section.TREE: _plain(tree),
        Section.LAYERS: _plain(sections[Section.LAYERS].data[: fbx.LAYER.size * len(tables)]),
        Section.SEEK: _plain(_cut_seek(sections[Section.SEEK].data, tables)),
        Section.DIGESTS: _plain(
            sections[Section.DIGESTS].data[: DIGEST_SIZE * sum(t.chunk_count for t in tables)]
        ),
        Section.WINDOWS: _cut_windows(sections[Section.WINDOWS], tables),
    }
    return FileIndex(fbx.write_expanded(content))


def _plain(data: bytes | memoryview) -> Stored:
    return Stored(Encoding.PLAIN, data, len(data), fbx.section_digest(data))


def _cut_seek(columns: bytes | memoryview, tables: Sequence[LayerTable]) -> bytes:
    """The columns of the seek points: u64 raw offsets, u64 bit offsets, u8 window flags."""
    kept = sum(len(table.raw_offsets) for table in tables)
    count = len(columns) // 17
    bit_offsets, flags = columns[8 * count :], columns[16 * count :]
    return b"".join((columns[: 8 * kept], bit_offsets[: 8 * kept], flags[:kept]))


def _cut_windows(windows: Stored, tables: Sequence[LayerTable]) -> Stored:
    """The windows in the frames they are in: compressing takes twenty times as long as reading."""
    kept = sum(bytes(table.window_flags).count(1) for table in tables)
    frames = fbx.window_frames(windows)[:kept]
    lengths = [fbx.WINDOW_LENGTH.pack(len(frame)) for frame in frames]
    raw = b"".join(fbx.decompress(frame, fbx.WINDOW_SIZE) for frame in frames)
    return Stored(
        Encoding.WINDOWS, b"".join((*lengths, *frames)), len(raw), fbx.section_digest(raw)
    )
