"""The files of an image that a start will probably read: found in its tree, wanted, looked into.

What is asked for is bounded, whatever the image says.
"""

from __future__ import annotations

import logging
import posixpath
import stat
from typing import TYPE_CHECKING

from index.errors import FormatError
from index.resolver import MAX_SYMLINKS, resolve
from index.tables import CHUNK_SIZE
from snapshotter.images import elf

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from index.erofs.reader import Image
    from snapshotter.fetch.layer import LazyLayer

log = logging.getLogger(__name__)

MAX_FILE = 16 << 20
"""Bytes of a file that is asked for as a whole; of larger ones a start reads a part."""

MAX_PROGRAM = 64 << 20
"""The same of a program, and of a library that it names itself: it comes after all else. Debian's
node has 0.1 MB and a library of 47, of whose 181 chunks a start reads some 130, each waited for."""

MAX_BYTES = 256 << 20
"""Raw bytes, in whole chunks, that are asked for in all: a start that reads more has other worries.
scipy reads 130 MB of them."""

MAX_FILES = 2048

SMALL_LAYER = 128 << 10
"""Compressed bytes of a layer that is wanted as a whole, unless it unpacks to more than a file may
have: what somebody has put on top of an image is there to be read."""

MAX_SMALL_LAYERS = 8
"""The topmost ones. Each costs a request."""

MAX_LOOKUPS = 20_000
"""Paths that are looked for, 20 us each: a hostile image could name any number. 60 libraries take
some 2000."""

MAX_LISTED = 100_000
"""Names in directories that are listed."""


class StartupFiles:
    """Of one image."""

    def __init__(self, tree: Image, layers: Sequence[LazyLayer]) -> None:
        self._tree = tree
        self._layers = layers
        self._wanted: set[int] = set()
        self._bytes = 0  # of raw space
        self._lookups = 0
        self._listed = 0
        self._directories: dict[bytes, Mapping[bytes, int]] = {}

    def find(self, path: bytes) -> tuple[int, bytes] | None:
        """The regular file that a path leads to, and its own path."""
        found = self._resolve(path)
        if found is None or not stat.S_ISREG(self._tree.inode(found[0]).mode):
            return None
        return found

    def names(self, directory: bytes) -> Mapping[bytes, int]:
        """The names in a directory, and their inodes; none if there is no such one."""
        names = self._directories.get(directory)
        if names is None:
            names = self._directories[directory] = dict(self._list(directory))
        return names

    def want_small_layers(self) -> None:
        """Want all of the layers that are small."""
        small = [
            one
            for one in self._layers
            if one.table.blob_size <= SMALL_LAYER and one.table.raw_size <= MAX_FILE
        ]
        for layer in small[-MAX_SMALL_LAYERS:]:
            self._want_chunks(layer, range(layer.table.chunk_count))

    def want_all_in(self, directory: bytes, largest: int, most: int, *, depth: int = 1) -> int:
        """Want the files in a directory, and so much further down, that have at most so many bytes,
        and that many of them. Returns how many those were."""
        wanted = 0
        for name, nid in self.names(directory).items():
            if wanted >= most:
                break
            path = posixpath.join(directory, name)
            if stat.S_ISDIR(self._tree.inode(nid).mode):
                if depth and name not in (b".", b".."):
                    wanted += self.want_all_in(path, largest, most - wanted, depth=depth - 1)
            elif (found := self.find(path)) and self._tree.inode(found[0]).size <= largest:
                wanted += self.want_inode(found[0])
        return wanted

    def want(self, path: bytes) -> tuple[int, bytes] | None:
        """Want a file, unless it is not there, or was wanted before; else its inode and path."""
        found = self.find(path)
        return found if found is not None and self.want_inode(found[0]) else None

    def want_inode(self, nid: int) -> bool:
        """Want a file, unless it is none, or was wanted before. Whether that is so."""
        inode = self._tree.inode(nid)
        if not stat.S_ISREG(inode.mode) or nid in self._wanted or len(self._wanted) >= MAX_FILES:
            return False
        self._wanted.add(nid)
        whole = inode.size <= MAX_FILE
        self.want_part(nid, 0, inode.size if whole else elf.HEAD)
        return self._bytes <= MAX_BYTES

    def want_program(self, nid: int) -> None:
        """Want all of a file of which only a part was wanted, because it is large."""
        size = self._tree.inode(nid).size
        if MAX_FILE < size <= MAX_PROGRAM:
            for offset in range(0, size, MAX_FILE):
                self.want_part(nid, offset, min(MAX_FILE, size - offset))

    def want_part(self, nid: int, offset: int, length: int) -> None:
        """Want some bytes of a file, but not more than of one that is wanted as a whole."""
        length = min(length, MAX_FILE)
        if self._bytes + length > MAX_BYTES:
            self._bytes = MAX_BYTES + 1
            return
        for piece in self._tree.map(nid, offset, length):
            if piece.device:
                layer = self._layers[piece.device - 1]
                first = piece.offset // CHUNK_SIZE
                last = (piece.offset + piece.length - 1) // CHUNK_SIZE
                self._want_chunks(layer, range(first, last + 1))

    def _want_chunks(self, layer: LazyLayer, chunks: range) -> None:
        self._bytes += CHUNK_SIZE * sum(chunk not in layer.foreseen for chunk in chunks)
        layer.foresee(chunks)

    async def read(self, nid: int, offset: int, length: int, *, urgent: bool = True) -> bytes:
        """Bytes of a file, fewer at its end. Raises FetchError, FormatError."""
        parts = []
        for piece in self._tree.map(nid, offset, length):
            if piece.device:
                layer = self._layers[piece.device - 1]
                parts.append(await layer.inspect(piece.offset, piece.length, urgent=urgent))
            else:
                parts.append(bytes(piece.length))
        return b"".join(parts)

    def _resolve(self, path: bytes) -> tuple[int, bytes] | None:
        """What a path leads to, symlinks followed, and its own path."""
        try:
            for _ in range(MAX_SYMLINKS):
                self._lookups += 1
                if self._lookups > MAX_LOOKUPS:
                    return None
                nid = resolve(self._tree, path)
                if nid is None:
                    return None
                if not stat.S_ISLNK(self._tree.inode(nid).mode):
                    return nid, path
                path = posixpath.join(posixpath.dirname(path), self._tree.readlink(nid))
        except FormatError as error:
            log.debug("%s", error)
        return None

    def _list(self, directory: bytes) -> Iterator[tuple[bytes, int]]:
        found = self._resolve(directory)
        if found is None or not stat.S_ISDIR(self._tree.inode(found[0]).mode):
            return
        try:
            for _, name, nid, _ in self._tree.readdir(found[0]):
                self._listed += 1
                if self._listed > MAX_LISTED:
                    return
                yield name, nid
        except FormatError as error:
            log.debug("%s", error)
