"""What the first start of an image will read, foreseen from the image alone.

Without a profile a start waits for one file after the other: its program, the dynamic loader, then
each library. All of that can be known before the container is made. The configuration names the
program, the program its loader and its libraries, those theirs; where they are the tree tells,
which is on the node. So they are asked for together, while the container is being made. What a
program opens by itself is not foreseen.

It is looked for as ld.so(8) does, but for its cache: DT_RPATH and DT_RUNPATH, LD_LIBRARY_PATH, the
directory of the loader itself (where a distribution has several architectures, that is the right
one), the default directories.
"""

from __future__ import annotations

import logging
import posixpath
import stat
from typing import TYPE_CHECKING

import trio

from index.errors import FirstByteError, FormatError
from index.resolver import MAX_SYMLINKS, resolve
from index.tables import CHUNK_SIZE
from snapshotter.images import elf

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from index.erofs.reader import Image
    from snapshotter.fetch.layer import LazyLayer
    from snapshotter.registry.manifest import RunConfig

log = logging.getLogger(__name__)

MAX_FILE = 16 << 20
"""Bytes of a file that is asked for as a whole; of larger ones a start reads a part."""

MAX_BYTES = 96 << 20
"""Raw bytes that are asked for in all: a start that reads more has other worries."""

MAX_FILES = 512

MAX_LOOKUPS = 10_000
"""Paths that are looked for, 20 us each: a hostile image could name any number. 60 libraries take
some 2000."""

_MAX_WORDS = 32  # of a command line
_MAX_LINE = 256  # bytes of a script's first line: the kernel's limit

_PATH = b"/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_LIBRARIES = (b"/lib", b"/usr/lib", b"/lib64", b"/usr/lib64", b"/usr/local/lib")

_ALWAYS = (b"/etc/passwd", b"/etc/group", b"/etc/ld.so.cache", b"/etc/nsswitch.conf")
"""Runtimes look up the user, the loader its cache, the C library where names are looked up."""


class Foresight:
    """Of one image."""

    def __init__(
        self,
        tree: Image,
        layers: Sequence[LazyLayer],
        config: RunConfig,
    ) -> None:
        self._tree = tree
        self._layers = layers
        environment = dict(_variable(entry) for entry in config.env or ())
        self._path = (environment.get(b"PATH") or _PATH).split(b":")
        self._libraries = environment.get(b"LD_LIBRARY_PATH", b"").split(b":")
        self._directory = _encoded(config.working_dir or "/")
        self._commands = [
            [*map(_encoded, words or ())] for words in (config.entrypoint, config.cmd)
        ]
        self._loaders: list[bytes] = []  # directories of loaders
        self._seen: set[int] = set()
        self._bytes = 0
        self._lookups = 0

    async def look(self) -> None:
        """Want all that can be foreseen. What cannot be read is left out."""
        async with trio.open_nursery() as nursery:
            for path in _ALWAYS:
                self._want_all(path)
            for path in self._named():
                nursery.start_soon(self._visit, nursery, path)

    # --- the command line ---

    def _named(self) -> Iterator[bytes]:
        """The files that the command line may name: its programs, and their arguments."""
        for words in self._commands:
            for number, word in enumerate(words[:_MAX_WORDS]):
                if number == 0:
                    yield from self._programs(word)
                elif b" " in word:  # `sh -c`
                    for part in word.split()[:_MAX_WORDS]:
                        yield from self._programs(part)
                else:
                    yield posixpath.join(self._directory, word)

    def _programs(self, word: bytes) -> Iterator[bytes]:
        if b"/" in word:
            yield posixpath.join(self._directory, word)
            return
        for directory in self._path:
            path = posixpath.join(directory, word)
            if self._find(path) is not None:
                yield path
                return

    # --- files ---

    async def _visit(self, nursery: trio.Nursery, path: bytes) -> None:
        """Want a file, and those that it cannot run without."""
        found = self._want_all(path)
        if found is None or len(self._seen) >= MAX_FILES:
            return
        nid, path = found
        try:
            head = await self._read(nid, 0, elf.HEAD)
            if head.startswith(b"#!"):
                followers = [*self._interpreters(head)]
            elif head.startswith(elf.MAGIC):
                followers = await self._linked(nid, path, head)
            else:
                return
        except FirstByteError as error:
            log.debug("what %r needs is not foreseen: %s", path, error)
            return
        for follower in followers:
            nursery.start_soon(self._visit, nursery, follower)

    def _interpreters(self, head: bytes) -> Iterator[bytes]:
        """Of a script, as execve(2) has it; `env` looks for one in the path."""
        words = head[2:_MAX_LINE].split(b"\n")[0].split()
        for word in words[:2]:
            yield from self._programs(word)

    async def _linked(self, nid: int, path: bytes, head: bytes) -> list[bytes]:
        """The loader and the libraries that a program or a library names."""
        found = []
        program = elf.program(head)
        if program.interpreter is not None:
            loader = (await self._part(nid, program.interpreter, elf.HEAD)).rstrip(b"\0")
            found.append(loader)
            if (real := self._find(loader)) is not None:
                self._loaders.append(posixpath.dirname(real[1]))
        if program.dynamic is not None:
            section = await self._part(nid, program.dynamic, elf.MAX_DYNAMIC)
            dynamic = elf.dynamic(program, section)
            table = await self._part(nid, dynamic.strings, elf.MAX_STRINGS)
            origin = posixpath.dirname(path)
            own = [
                one.replace(b"${ORIGIN}", origin).replace(b"$ORIGIN", origin)
                for at in dynamic.paths
                for one in elf.string(table, at).split(b":")
            ]
            places = [*own, *self._libraries, *self._loaders, *_LIBRARIES]
            for at in dynamic.needed:
                found += self._library(elf.string(table, at), places)
        return found

    def _library(self, name: bytes, places: Iterable[bytes]) -> Iterator[bytes]:
        for place in places:
            path = posixpath.join(place, name)
            if path.startswith(b"/") and self._find(path) is not None:
                yield path
                return

    def _find(self, path: bytes) -> tuple[int, bytes] | None:
        """The regular file that a path leads to, and its own path."""
        try:
            for _ in range(MAX_SYMLINKS):
                self._lookups += 1
                if self._lookups > MAX_LOOKUPS:
                    return None
                nid = resolve(self._tree, path)
                if nid is None:
                    return None
                mode = self._tree.inode(nid).mode
                if not stat.S_ISLNK(mode):
                    return (nid, path) if stat.S_ISREG(mode) else None
                path = posixpath.join(posixpath.dirname(path), self._tree.readlink(nid))
        except FormatError as error:
            log.debug("%s", error)
        return None

    # --- bytes ---

    def _want_all(self, path: bytes) -> tuple[int, bytes] | None:
        """Want a file, unless it is not there, or was wanted before; else its inode and path."""
        found = self._find(path)
        if found is None or found[0] in self._seen:
            return None
        nid = found[0]
        self._seen.add(nid)
        size = self._tree.inode(nid).size
        length = size if size <= MAX_FILE else elf.HEAD
        self._bytes += length
        if self._bytes > MAX_BYTES:
            return None
        for piece in self._tree.map(nid, 0, length):
            if piece.device:
                first = piece.offset // CHUNK_SIZE
                last = (piece.offset + piece.length - 1) // CHUNK_SIZE
                self._layers[piece.device - 1].foresee(range(first, last + 1))
        return found

    async def _part(self, nid: int, part: elf.Part, limit: int) -> bytes:
        if part.size > limit:
            raise FormatError(f"a part of an ELF file has {part.size} bytes")
        return await self._read(nid, part.offset, part.size)

    async def _read(self, nid: int, offset: int, length: int) -> bytes:
        """Bytes of a file, fewer at its end."""
        parts = []
        for piece in self._tree.map(nid, offset, length):
            if piece.device:
                layer = self._layers[piece.device - 1]
                parts.append(await layer.inspect(piece.offset, piece.length))
            else:
                parts.append(bytes(piece.length))
        return b"".join(parts)


def _variable(entry: str) -> tuple[bytes, bytes]:
    name, _, value = entry.partition("=")
    return _encoded(name), _encoded(value)


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")
