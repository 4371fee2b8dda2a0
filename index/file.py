"""An open file index: the tree, the layer tables and the windows, read in place."""

from __future__ import annotations

import mmap
import os
import sys
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

from index import format as fbx
from index.erofs.layout import SLOT_SIZE
from index.erofs.reader import Image
from index.errors import FormatError, IntegrityError, UnsupportedError
from index.format import Encoding, Section
from index.tables import CHUNK_SIZE, DIGEST_SIZE, Codec, LayerTable

if TYPE_CHECKING:
    from pathlib import Path

    from index.format import Stored

# Bytes at the beginning, where header and superblock are, and at the root directory: somewhat more
# than is read of either.
_FIRST = 16 << 10

KNOWN_CODECS = frozenset(int(codec) for codec in Codec)


class FileState(NamedTuple):
    """What of a file changes when it is replaced, or written to through its file system."""

    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int


class FileIndex:
    """A file index in its expanded form.

    Open with `FileIndex.open(path)` or, from bytes of either form, with `FileIndex.load(data)`.
    There is nothing to close: the mapping goes with the last view of it (tables, the tree).
    """

    def __init__(
        self, file: bytes | mmap.mmap, state: FileState | None = None, *, checked: bool = False
    ) -> None:
        """Raise FormatError, IntegrityError or UnsupportedError unless all of it is as it was
        made: by the checksums of who took it in, else (but for the windows) by its digests. What
        was `checked` before is not looked through again.

        A wrong window only ever yields chunks that fail their own digests.
        """
        if sys.byteorder != "little":
            raise UnsupportedError("file indexes are read in place, on little-endian machines only")
        self.state = state
        """The file as it was when it was opened; None if there is none."""
        self._file = file
        self._view = memoryview(file)
        self._sections = fbx.read(self._view)
        self.digest = fbx.index_digest(self._sections)
        intact = checked or fbx.intact(self._view, self._sections)
        for section, stored in self._sections.items():
            if section is Section.WINDOWS:
                continue
            if stored.encoding is not Encoding.PLAIN:
                raise FormatError("the file index is not in its expanded form")
            if len(stored.data) != stored.raw_size:
                raise FormatError(f"section {section.name} of the file index has a wrong size")
            if not intact and fbx.section_digest(stored.data) != stored.digest:
                raise IntegrityError(f"section {section.name} of the file index is damaged")
        self.tree = Image(self._sections[Section.TREE].data)
        self.layers, self._first_window = _layers(self._sections)
        self._window_frames: list[memoryview] | None = None

    @classmethod
    def open(cls, path: Path, checked: FileState | None = None) -> FileIndex:
        """Map an expanded index that this node has taken in before (`load`) or built.

        Its digest is the caller's to compare with the one it expects. `checked` is the `state` of
        the same file when it was opened before: if nothing has written to it since, its checksums
        are not computed again (of an image of 1 000 000 files: 14 ms, and 146 MB to be read).
        """
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            state = FileState(status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
            try:
                mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
            except ValueError as error:  # an empty file cannot be mapped
                raise FormatError(f"{path} is empty") from error
            if state == checked:
                index = cls._open_checked(file.fileno(), mapped, state)
            else:
                index = cls(mapped, state)
        index.trim()
        return index

    @classmethod
    def _open_checked(cls, file: int, mapped: mmap.mmap, state: FileState) -> FileIndex:
        """Have the disk asked at once for what is read here, and by who mounts the tree; and let no
        page fault ask for more. By itself the kernel fetches what is around a fault, as far as
        the disk's read-ahead goes: that may be megabytes, which the next fault waits for.
        """

        def ask(start: int, length: int) -> None:
            if length:  # 0 would be all of the file
                os.posix_fadvise(file, start, length, os.POSIX_FADV_WILLNEED)

        mapped.madvise(mmap.MADV_RANDOM)
        ask(0, _FIRST)
        places = fbx.places(memoryview(mapped))
        for section in (Section.LAYERS, Section.SEEK):
            ask(places[section].start, len(places[section]))
        index = cls(mapped, state, checked=True)
        tree = index.tree
        ask(places[Section.TREE].start + tree.meta_start + tree.root * SLOT_SIZE, _FIRST)
        mapped.madvise(mmap.MADV_NORMAL)
        return index

    @classmethod
    def load(cls, data: bytes | memoryview) -> FileIndex:
        """Take in an index of either form, verifying all of it, the windows too."""
        return cls(fbx.write_expanded(fbx.expand(fbx.read(data))), checked=True)

    def trim(self) -> None:
        """Give the memory back that reading a mapped index has taken, until it is read again.

        What was mapped to be verified counts as this process's memory, all of it, although nearly
        nothing of it is ever read.
        """
        if isinstance(self._file, mmap.mmap):
            self._file.madvise(mmap.MADV_DONTNEED)

    @property
    def expanded(self) -> memoryview:
        """The whole file, to be stored."""
        return self._view

    def packed(self) -> bytes:
        """The form that travels."""
        return fbx.write(fbx.compress(self._sections))

    @property
    def section_sizes(self) -> dict[str, int]:
        """Bytes of each section in the expanded form, where windows stay compressed."""
        return {
            section.name.lower(): len(stored.data)
            for section, stored in sorted(self._sections.items())
        }

    def describes_the_same(self, other: FileIndex) -> bool:
        """Whether tree, layers and chunks are the same; seek points may be others."""
        ours, theirs = (
            [
                (table.digest, table.diff_id, table.codec, table.blob_size, table.content_key)
                for table in index.layers
            ]
            for index in (self, other)
        )
        return ours == theirs and bytes(self.tree.buffer) == bytes(other.tree.buffer)

    def window(self, layer: int, point: int) -> bytes | None:
        """The 32 KiB before a seek point, or None where decoding needs none."""
        table = self.layers[layer]
        if not table.window_flags[point]:
            return None
        if self._window_frames is None:
            self._window_frames = fbx.window_frames(self._sections[Section.WINDOWS])
        before = bytes(table.window_flags[:point]).count(1)
        frame = self._window_frames[self._first_window[layer] + before]
        return fbx.decompress(frame, fbx.WINDOW_SIZE)


def _layers(sections: dict[Section, Stored]) -> tuple[tuple[LayerTable, ...], list[int]]:
    """Cut the columns into layers. Returns the tables and each layer's first window's number."""
    rows_data = memoryview(sections[Section.LAYERS].data)
    if len(rows_data) % fbx.LAYER.size:
        raise FormatError("the layer table of the file index has a wrong size")
    rows = list(fbx.LAYER.iter_unpack(rows_data))
    points = [0, *accumulate(row[5] for row in rows)]
    windows = [0, *accumulate(row[6] for row in rows)]
    chunks = [0, *accumulate(-(-row[3] // CHUNK_SIZE) for row in rows)]
    seek = memoryview(sections[Section.SEEK].data)
    digests = memoryview(sections[Section.DIGESTS].data)
    if len(seek) != 17 * points[-1]:
        raise FormatError("the seek points of the file index have a wrong size")
    if len(digests) != DIGEST_SIZE * chunks[-1]:
        raise FormatError("the chunk digests of the file index have a wrong size")
    if sections[Section.WINDOWS].raw_size != fbx.WINDOW_SIZE * windows[-1]:
        raise FormatError("the windows of the file index have a wrong size")
    raw_offsets = seek[: 8 * points[-1]].cast("Q")
    bit_offsets = seek[8 * points[-1] : 16 * points[-1]].cast("Q")
    flags = seek[16 * points[-1] :]
    tables: list[LayerTable] = []
    for number, row in enumerate(rows):
        digest, diff_id, blob_size, raw_size, codec, _, window_count, _ = row
        if codec not in KNOWN_CODECS:
            raise UnsupportedError(f"layer {number} of the file index has codec {codec}")
        first, last = points[number], points[number + 1]
        table = LayerTable(
            digest=digest,
            diff_id=diff_id,
            codec=Codec(codec),
            blob_size=blob_size,
            raw_size=raw_size,
            raw_offsets=raw_offsets[first:last],
            bit_offsets=bit_offsets[first:last],
            window_flags=flags[first:last],
            digests=digests[DIGEST_SIZE * chunks[number] : DIGEST_SIZE * chunks[number + 1]],
        )
        table.check()
        if bytes(table.window_flags).count(1) != window_count:
            raise FormatError(f"{table} has a wrong number of windows")
        tables.append(table)
    return tuple(tables), windows
