"""What the first start of an image will read, foreseen from the image alone.

Without a profile a start waits for one file after the other: its program, the dynamic loader, then
each library. All of that can be known before the container is made. The configuration names the
program, the program its loader and its libraries, those theirs; where they are the tree tells,
is on the node. So they are asked for together, while the container is being made. If the program
is Python, so are the modules that it will import (`python_modules`). Of large files what the loader
reads is wanted first, the rest of the program and its own libraries at the end. What else a program
opens by itself is not foreseen.

It is looked for as ld.so(8) does, but for its cache: DT_RPATH and DT_RUNPATH, LD_LIBRARY_PATH, the
directory of the loader itself (where a distribution has several architectures, that is the right
one), the default directories.
"""

from __future__ import annotations

import logging
import posixpath
from typing import TYPE_CHECKING

import trio

from index.errors import FirstByteError, FormatError
from snapshotter.images import elf
from snapshotter.images.python_imports import MAX_SOURCE
from snapshotter.images.python_modules import PythonModules
from snapshotter.images.startup_files import StartupFiles

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from index.erofs.reader import Image
    from snapshotter.fetch.layer import LazyLayer
    from snapshotter.registry.manifest import RunConfig

log = logging.getLogger(__name__)

_MAX_WORDS = 32  # of a command line
_MAX_LINE = 256  # bytes of a script's first line: the kernel's limit

_PATH = b"/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_LIBRARIES = (b"/lib", b"/usr/lib", b"/lib64", b"/usr/lib64", b"/usr/local/lib")

_ALWAYS = (
    b"/etc/passwd",
    b"/etc/group",
    b"/etc/ld.so.cache",
    b"/etc/nsswitch.conf",
    b"/etc/localtime",
)
"""Runtimes look up the user, the loader its cache, the C library where names are looked up and
what time it is."""


_COME_WITH = {
    b"libcrypto.so": (b"/etc/ssl/openssl.cnf", b"/etc/pki/tls/openssl.cnf"),
}
"""What libraries open by themselves, whoever uses them. OpenSSL's own path to the former is a
symlink to it in Debian and Alpine; the latter is Red Hat's."""

LARGEST_CONFIGURATION = 64 << 10
MOST_CONFIGURATION = 64
"""Bytes of a file, and files, that configure a program."""

_NAMED, _LINKED, _FAR = 0, 1, 2
"""Distances from the command line: on it; a library of a program there; any more."""


class Foresight:
    """Of one image."""

    def __init__(
        self,
        tree: Image,
        layers: Sequence[LazyLayer],
        config: RunConfig,
    ) -> None:
        self._files = StartupFiles(tree, layers)
        environment = dict(_variable(entry) for entry in config.env or ())
        self._path = (environment.get(b"PATH") or _PATH).split(b":")
        self._libraries = environment.get(b"LD_LIBRARY_PATH", b"").split(b":")
        self._directory = _encoded(config.working_dir or "/")
        self._python_path = environment.get(b"PYTHONPATH", b"").split(b":")
        self._python: PythonModules | None = None
        self._scripts: list[bytes] = []
        self._commands = [
            [*map(_encoded, words or ())] for words in (config.entrypoint, config.cmd)
        ]
        self._loaders: list[bytes] = []  # directories of loaders
        self._programs_proper: list[int] = []
        self._configurable: list[bytes] = []

    async def look(self) -> None:
        """Want all that can be foreseen. What cannot be read is left out."""
        async with trio.open_nursery() as nursery:
            for path in _ALWAYS:
                self._files.want(path)
            for path in self._named():
                nursery.start_soon(self._visit, nursery, path, _NAMED)
        # What comes later in a start must not be in the way of what its first second waits for.
        for program in self._configurable:
            self._configured(program)
        self._files.want_small_layers()
        for nid in self._programs_proper:
            self._files.want_program(nid)

    # --- the command line ---

    def _named(self) -> Iterator[bytes]:
        """The files that the command line may name: its programs, and their arguments."""
        for words in self._commands:
            for number, word in enumerate(words[:_MAX_WORDS]):
                if number == 0:
                    yield from self._programs(word)
                if b" " in word:  # `sh -c`
                    for part in word.split()[:_MAX_WORDS]:
                        yield from self._programs(part)
                else:  # what comes after an entrypoint is an argument, the first one as well
                    yield posixpath.join(self._directory, word)

    def _programs(self, word: bytes) -> Iterator[bytes]:
        if b"/" in word:
            yield posixpath.join(self._directory, word)
            return
        for directory in self._path:
            path = posixpath.join(directory, word)
            if self._files.find(path) is not None:
                yield path
                return

    # --- files ---

    async def _visit(self, nursery: trio.Nursery, path: bytes, distance: int = _FAR) -> None:
        """Want a file, and those that it cannot run without. `distance` is how many libraries are
        between it and the command line."""
        found = self._files.want(path)
        if found is None:
            return
        nid, real = found
        for name, others in _COME_WITH.items():
            if posixpath.basename(real).startswith(name):
                for other in others:
                    self._files.want(other)
        try:
            head = await self._files.read(nid, 0, elf.HEAD)
            if head.startswith(b"#!") or real.endswith(b".py"):
                followers, beyond = [*self._interpreters(head)], distance
                self._run_script(nursery, await self._files.read(nid, 0, MAX_SOURCE))
            elif head.startswith(elf.MAGIC):
                if PythonModules.runs(real):
                    self._run_python(nursery, real, path)
                if distance <= _LINKED:
                    self._programs_proper.append(nid)
                followers, beyond = await self._linked(nid, real, head), distance + 1
            else:
                return
        except FirstByteError as error:
            log.debug("what %r needs is not foreseen: %s", path, error)
            return
        if distance == _NAMED:
            self._configurable.append(posixpath.basename(path))
        for follower in followers:
            nursery.start_soon(self._visit, nursery, follower, beyond)

    def _configured(self, program: bytes) -> None:
        """Want what is in /etc for a program, by its name: of redis-server that of redis, too."""
        for name in dict.fromkeys((program, program.partition(b"-")[0])):
            if name:
                directory = posixpath.join(b"/etc", name)
                self._files.want_all_in(directory, LARGEST_CONFIGURATION, MOST_CONFIGURATION)

    def _run_python(self, nursery: trio.Nursery, interpreter: bytes, named: bytes) -> None:
        """Once the interpreter is known, its modules can be found."""
        if self._python is not None:
            return
        words = [word for command in self._commands for word in command[:_MAX_WORDS]]
        scripts = [posixpath.dirname(word) for word in words if word.endswith(b".py")]
        places = [posixpath.join(self._directory, place) for place in (*scripts, b"")]
        places += [place for place in self._python_path if place]
        self._python = PythonModules(self._files, interpreter, named, places, self._visit)
        self._python.start(nursery, words)
        for source in self._scripts:
            self._python.run(nursery, source)

    def _run_script(self, nursery: trio.Nursery, source: bytes) -> None:
        """A script, which may be Python's."""
        if self._python is None:
            self._scripts.append(source)
        else:
            self._python.run(nursery, source)

    def _interpreters(self, head: bytes) -> Iterator[bytes]:
        """Of a script, as execve(2) has it; `env` looks for one in the path."""
        if not head.startswith(b"#!"):
            return
        words = head[2:_MAX_LINE].split(b"\n")[0].split()
        for word in words[:2]:
            yield from self._programs(word)

    async def _linked(self, nid: int, path: bytes, head: bytes) -> list[bytes]:
        """The loader and the libraries that a program or a library names."""
        found = []
        program = elf.program(head)
        for part in program.linked:
            self._files.want_part(nid, part.offset, part.size)
        if program.interpreter is not None:
            loader = (await self._part(nid, program.interpreter, elf.HEAD)).rstrip(b"\0")
            found.append(loader)
            if (real := self._files.find(loader)) is not None:
                self._loaders.append(posixpath.dirname(real[1]))
        if program.dynamic is not None:
            section = await self._part(nid, program.dynamic, elf.MAX_DYNAMIC)
            dynamic = elf.dynamic(program, section)
            origin = posixpath.dirname(path)
            own = [
                one.replace(b"${ORIGIN}", origin).replace(b"$ORIGIN", origin)
                for at in dynamic.paths
                for one in (await self._name(nid, dynamic.strings, at)).split(b":")
            ]
            places = [*own, *self._libraries, *self._loaders, *_LIBRARIES]
            for at in dynamic.needed:
                found += self._library(await self._name(nid, dynamic.strings, at), places)
        return found

    def _library(self, name: bytes, places: Iterable[bytes]) -> Iterator[bytes]:
        for place in places:
            path = posixpath.join(place, name)
            if path.startswith(b"/") and self._files.find(path) is not None:
                yield path
                return

    async def _name(self, nid: int, strings: elf.Part, place: int) -> bytes:
        return elf.string(await self._part(nid, elf.name_at(strings, place), elf.MAX_NAME))

    async def _part(self, nid: int, part: elf.Part, limit: int) -> bytes:
        if part.size > limit:
            raise FormatError(f"a part of an ELF file has {part.size} bytes")
        return await self._files.read(nid, part.offset, part.size)


def _variable(entry: str) -> tuple[bytes, bytes]:
    name, _, value = entry.partition("=")
    return _encoded(name), _encoded(value)


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")
