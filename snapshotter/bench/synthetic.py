"""File indexes of made-up images, of any number of files; the same number gives the same index.

Names, depth, sizes and the share of symbolic links are like those of images of language runtimes
and their libraries. Layers are as `firstbyte convert` writes them.
"""

from __future__ import annotations

import hashlib
import random
from array import array
from typing import TYPE_CHECKING

from index import format as fbx
from index.convert import FRAME_SIZE
from index.entry import Entry, EntryType, Segment
from index.erofs import writer
from index.erofs.layout import NANOSECONDS
from index.file import FileIndex
from index.header import BLOCK
from index.merge import Merger
from index.tables import CHUNK_SIZE, DIGEST_SIZE, Codec, LayerTable

if TYPE_CHECKING:
    from collections.abc import Iterator

_LAYERS = 10
_SEED = 1
_WORDS = (
    "app",
    "base",
    "con",
    "data",
    "en",
    "get",
    "in",
    "log",
    "net",
    "opt",
    "re",
    "test",
    "util",
)
_SUFFIXES = (".py", ".pyc", ".so", ".json", ".h", ".js", ".txt", "")
_FILES_A_DIRECTORY = 24  # at most; 12 on average
_SYMLINKS = 0.05  # of all names
_LOG_SIZE, _LOG_SPREAD = 8.0, 1.8  # of a log-normal distribution: median 3 KB, mean 15 KB
_MAX_SIZE = 64 << 20
_MTIMES = range(1_690_000_000, 1_700_000_000)  # seconds; one for all that lies in a directory
_COMPRESSED_BITS_A_BYTE = 3


def make_index(files: int) -> FileIndex:
    """The index of an image with so many files and links, and the directories they are in."""
    merger = Merger()
    tables = []
    for number in range(_LAYERS):
        layer = _Layer(number, files // _LAYERS + (number < files % _LAYERS))
        merger.apply(number, layer.entries())
        tables.append(layer.table())
    tree = writer.write(merger.finish(), [table.raw_size for table in tables])
    content = fbx.lay_out(tree, tables, [()] * _LAYERS)
    return FileIndex(fbx.write_expanded(content))


class _Layer:
    """Makes up one layer: first its entries, then the table for as much raw space as they took."""

    def __init__(self, number: int, names: int) -> None:
        self._number = number
        self._names = names
        self._random = random.Random(_SEED + number)  # noqa: S311  (made-up data)
        self._raw_size = 0
        self._mtime_ns = 0

    def entries(self) -> Iterator[Entry]:
        left = self._names
        while left:
            parent = "/".join(("usr/lib", self._word(), self._word(), self._word())).encode()
            self._raw_size += BLOCK
            self._mtime_ns = self._random.choice(_MTIMES) * NANOSECONDS
            yield Entry(parent, EntryType.DIRECTORY, 0o755, mtime_ns=self._mtime_ns)
            count = min(left, self._random.randint(1, _FILES_A_DIRECTORY))
            left -= count
            for name in range(count):
                suffix = self._random.choice(_SUFFIXES)
                # The number keeps names apart, so that none replaces another.
                yield self._entry(parent + f"/{self._word()}{left + name}{suffix}".encode())

    def table(self) -> LayerTable:
        points = range(0, self._raw_size, FRAME_SIZE)
        name = hashlib.sha256(self._number.to_bytes(4, "little")).digest()
        return LayerTable(
            digest=name,
            diff_id=name,
            codec=Codec.ZSTD,
            blob_size=self._raw_size * _COMPRESSED_BITS_A_BYTE // 8,
            raw_size=self._raw_size,
            raw_offsets=array("Q", points),
            bit_offsets=array("Q", (raw // 8 * _COMPRESSED_BITS_A_BYTE * 8 for raw in points)),
            window_flags=bytes(len(points)),
            digests=self._random.randbytes(-(-self._raw_size // CHUNK_SIZE) * DIGEST_SIZE),
        )

    def _entry(self, path: bytes) -> Entry:
        self._raw_size += BLOCK
        if self._random.random() < _SYMLINKS:
            target = self._word().encode()
            return Entry(path, EntryType.SYMLINK, mtime_ns=self._mtime_ns, linkname=target)
        size = min(int(self._random.lognormvariate(_LOG_SIZE, _LOG_SPREAD)), _MAX_SIZE)
        segments = (Segment(0, self._raw_size, size),) if size else ()
        self._raw_size += size + -size % BLOCK
        mode = self._random.choice((0o644, 0o644, 0o644, 0o755))
        return Entry(
            path, EntryType.REGULAR, mode, size=size, mtime_ns=self._mtime_ns, segments=segments
        )

    def _word(self) -> str:
        return "_".join(self._random.choices(_WORDS, k=self._random.randint(1, 3)))
