"""What a Java virtual machine reads before its program does anything, found in an image's tree.

The launcher loads the machine by name, so its ELF file does not tell: libjvm.so, in a place
relative to itself (JDK 9 and later: bin/java, lib/server/libjvm.so). That maps the shared archive
of classes (CDS, JEP 341) and the tables of `lib/modules` (a jimage file, JEP 220), and opens the
archives of classes on its path, mostly all of each. Servers have those in directories of their own,
which an environment variable names (CATALINA_HOME).
"""

from __future__ import annotations

import posixpath
import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence

    import trio

    from snapshotter.images.startup_files import StartupFiles

_MACHINE = b"lib/server/libjvm.so"
_SHARED_CLASSES = b"lib/server/classes.jsa"
_MODULES = b"lib/modules"

_LIBRARIES = (
    b"libjli.so",
    b"libjava.so",
    b"libjimage.so",
    b"libzip.so",
    b"libnio.so",
    b"libnet.so",
)
_SETTINGS = (b"lib/jvm.cfg", b"lib/tzdb.dat", b"conf/security/java.security")

# jimage header: magic and version; flags; resources; slots of the hash table; bytes of locations,
# and of strings. A slot has two words (jdk.internal.jimage.ImageHeader).
_JIMAGE = struct.Struct("<IIIIIII")
_JIMAGE_MAGIC = 0xCAFEDADA
_SLOT_SIZE = 8

_HOME = b"_HOME"
_RUNTIMES = (b"JAVA_HOME", b"JRE_HOME", b"JDK_HOME")
_OF_SERVERS = (b"lib", b"libs", b"bin")
_ARCHIVE = b".jar"

_DIRECTORY = 1 << 20
"""Bytes at the end of an archive that is too large to be wanted as a whole: that is where its
directory is."""


class JavaRuntime:
    """Of one launcher."""

    def __init__(
        self,
        files: StartupFiles,
        launcher: bytes,
        visit: Callable[[trio.Nursery, bytes], Awaitable[None]],
    ) -> None:
        """`visit` wants a library, and those that it needs."""
        self._files = files
        self._visit = visit
        self._home = posixpath.dirname(posixpath.dirname(launcher))

    @staticmethod
    def runs(program: bytes) -> bool:
        """Whether a program is a launcher, by its own path."""
        return posixpath.basename(program) == b"java"

    async def look(
        self,
        nursery: trio.Nursery,
        words: Sequence[bytes],
        environment: Mapping[bytes, bytes],
        directory: bytes,
    ) -> None:
        """Want what is read whatever the program is, and the archives that its command line or
        environment names, relative to `directory`. Raises FetchError, FormatError."""
        machine = self._own(_MACHINE)
        if self._files.find(machine) is None:
            return
        for name in _LIBRARIES:
            nursery.start_soon(self._visit, nursery, self._own(b"lib/" + name))
        nursery.start_soon(self._visit, nursery, machine)
        for path in (_SHARED_CLASSES, *_SETTINGS):
            self._files.want(self._own(path))
        self._want_most(machine)
        for path in self._archives(words, environment, directory):
            self._want_archive(path)
        await self._want_modules()

    def _own(self, path: bytes) -> bytes:
        return posixpath.join(self._home, path)

    def _want_most(self, path: bytes) -> None:
        """All of a file, or as much as is asked for of any."""
        if (found := self._files.find(path)) is not None:
            self._files.want_part(found[0], 0, self._files.size(found[0]))

    async def _want_modules(self) -> None:
        """The tables at the beginning, in which every class is looked up."""
        if (found := self._files.find(self._own(_MODULES))) is None:
            return
        head = await self._files.read(found[0], 0, _JIMAGE.size)
        if len(head) < _JIMAGE.size:
            return
        magic, _, _, _, slots, locations, strings = _JIMAGE.unpack(head)
        if magic == _JIMAGE_MAGIC:
            tables = _JIMAGE.size + _SLOT_SIZE * slots + locations + strings
            self._files.want_part(found[0], 0, min(tables, self._files.size(found[0])))

    def _want_archive(self, path: bytes) -> None:
        found = self._files.find(path)
        if found is not None:
            self._files.want_inode(found[0])  # unless it was, as an argument
            size = self._files.size(found[0])
            start = max(0, size - _DIRECTORY)
            self._files.want_part(found[0], start, size - start)

    def _archives(
        self, words: Sequence[bytes], environment: Mapping[bytes, bytes], directory: bytes
    ) -> Iterator[bytes]:
        for word in (*words, environment.get(b"CLASSPATH", b"")):
            for part in word.split(b":"):
                path = posixpath.join(directory, part)
                if part.endswith(_ARCHIVE):
                    yield path
                elif part.endswith(b"/*"):
                    yield from self._archives_in(path[:-2])
        for name, value in environment.items():
            if name.endswith(_HOME) and name not in _RUNTIMES:
                for place in _OF_SERVERS:
                    yield from self._archives_in(posixpath.join(directory, value, place))

    def _archives_in(self, directory: bytes) -> Iterator[bytes]:
        for name in self._files.names(directory):
            if name.endswith(_ARCHIVE):
                yield posixpath.join(directory, name)
