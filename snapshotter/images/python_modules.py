"""The Python modules that a program will import, found in an image's tree.

A start of Python opens some hundred small files one after the other, and waits for each. Which they
are its sources say: they are read, and what they import is looked for where the interpreter will
look (sys.path as the module `site` makes it; Debian's dist-packages, too). What is compiled already
is wanted in that form (PEP 3147), extension modules with the libraries that they need.
"""

from __future__ import annotations

import logging
import posixpath
import re
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

from index.errors import FirstByteError
from snapshotter.images.python_imports import MAX_SOURCE, Import, imports

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Sequence

    import trio

    from snapshotter.images.startup_files import StartupFiles

log = logging.getLogger(__name__)

_INTERPRETER = re.compile(rb"python3\.(\d+)")

_APPLICATION = re.compile(rb"([A-Za-z_][\w.]*):[A-Za-z_][\w.]*(?:\(\))?")
"""What servers are told to serve: the module and a name in it, as for gunicorn and uvicorn."""

_ALWAYS = (b"encodings", b"encodings.aliases", b"encodings.utf_8", b"site", b"sitecustomize")
"""Imported by every start, besides what these import."""

_LOCALE = b"/usr/lib/locale/C.utf8/LC_CTYPE"  # Python's own choice where there is none (PEP 538)

_CONVERSIONS = (
    b"/usr/lib/x86_64-linux-gnu/gconv/gconv-modules.cache",
    b"/usr/lib/aarch64-linux-gnu/gconv/gconv-modules.cache",
    b"/usr/lib64/gconv/gconv-modules.cache",
)
"""What the GNU C library reads when it has to convert from or to that locale."""

_TO_RUN_A_MODULE = (b"runpy",)  # python -m

_PLATFORMS = [
    b"%s-linux-%s.so" % (machine, library)
    for machine in (b"x86_64", b"aarch64")
    for library in (b"gnu", b"musl")
]

_Name = tuple[bytes, ...]  # of a module, in parts

MAX_NAMES = 20_000
"""Names that are looked for; most are of no module."""


class _Found(NamedTuple):
    """A module. `directory` is where modules are that are in it, if it is a package; the others are
    inodes, and the path of an extension module."""

    directory: bytes | None = None
    source: int | None = None
    compiled: int | None = None
    extension: bytes | None = None


class PythonModules:
    """What one interpreter will import."""

    def __init__(
        self,
        files: StartupFiles,
        interpreter: bytes,
        named: bytes,
        places: Sequence[bytes],
        visit: Callable[[trio.Nursery, bytes], Awaitable[None]],
    ) -> None:
        """The `interpreter` was `named` so, which in a virtual environment is somewhere else.
        `places` are searched before its own directories. `visit` wants a library, and those that
        it needs."""
        self._files = files
        self._visit = visit
        self._found: dict[_Name, _Found | None] = {}
        version = posixpath.basename(interpreter)
        self._tag = version.replace(b"python3.", b"cpython-3")
        self._suffixes = [
            *(b".%s-%s" % (self._tag, platform) for platform in _PLATFORMS),
            b".abi3.so",
            b".so",
        ]
        own = posixpath.join(_prefix(named), b"lib", version, b"site-packages")
        self._places = [*dict.fromkeys([*places, *_site(version, interpreter), own])]

    @staticmethod
    def runs(program: bytes) -> bool:
        """Whether a program is an interpreter that is known here: python3.N."""
        return _INTERPRETER.fullmatch(posixpath.basename(program)) is not None

    def start(self, nursery: trio.Nursery, words: Sequence[bytes]) -> None:
        """Want what is imported when the interpreter is run with these arguments."""
        for path in (_LOCALE, *_CONVERSIONS):
            self._files.want(path)
        self._look_into_paths(nursery)
        names = [*_ALWAYS]
        for option, value in pairwise((b"", *words)):
            if option == b"-m":
                names += [*_TO_RUN_A_MODULE, value, value + b".__main__"]
            elif option == b"-c":
                self.run(nursery, value)
            elif application := _APPLICATION.fullmatch(value):
                names.append(application[1])
        for name in names:
            self._import(nursery, tuple(name.split(b".")))

    def run(self, nursery: trio.Nursery, source: bytes) -> None:
        """Want what a program imports."""
        for one in imports(source[:MAX_SOURCE]):
            self._follow(nursery, one, ())

    def _follow(self, nursery: trio.Nursery, one: Import, package: _Name) -> None:
        base: _Name = ()
        if one.level:
            if one.level > len(package):
                return
            base = package[: len(package) - one.level + 1]
        module = base + tuple(part for part in one.module.split(b".") if part)
        self._import(nursery, module)
        for name in one.names:
            self._import(nursery, (*module, name))

    def _import(self, nursery: trio.Nursery, module: _Name) -> None:
        """Want a module, and the packages that it is in."""
        places = self._places
        for length in range(1, len(module) + 1):
            name = module[:length]
            if name not in self._found:
                if len(self._found) >= MAX_NAMES:
                    return
                found = self._found[name] = self._find(places, name[-1])
                if found is not None:
                    self._want(nursery, name, found)
            found = self._found[name]
            if found is None or found.directory is None:
                return
            places = [found.directory]

    def _want(self, nursery: trio.Nursery, name: _Name, found: _Found) -> None:
        if found.extension is not None:
            nursery.start_soon(self._visit, nursery, found.extension)
        if found.source is None:
            return
        if self._files.want_inode(found.source if found.compiled is None else found.compiled):
            package = name if found.directory is not None else name[:-1]
            nursery.start_soon(self._look_into, nursery, found.source, package)

    async def _look_into(self, nursery: trio.Nursery, source: int, package: _Name) -> None:
        try:
            text = await self._files.read(source, 0, MAX_SOURCE, urgent=False)
        except FirstByteError as error:
            log.debug("what a module of %r imports is not foreseen: %s", package, error)
            return
        for one in imports(text):
            self._follow(nursery, one, package)

    def _look_into_paths(self, nursery: trio.Nursery) -> None:
        """Want the .pth files that the module `site` reads, and what they import."""
        for place in self._places:
            if place.endswith(b"-packages"):
                for name, nid in self._files.names(place).items():
                    if name.endswith(b".pth") and self._files.want_inode(nid):
                        nursery.start_soon(self._look_into, nursery, nid, ())

    def _find(self, places: Sequence[bytes], name: bytes) -> _Found | None:
        """As importlib's FileFinder does it: packages first, then extensions, then sources."""
        for place in places:
            names = self._files.names(place)
            if name in names:
                inner = posixpath.join(place, name)
                if b"__init__.py" in self._files.names(inner):
                    return self._source(inner, b"__init__", inner)
            for suffix in self._suffixes:
                if name + suffix in names:
                    return _Found(extension=posixpath.join(place, name + suffix))
            if name + b".py" in names:
                return self._source(place, name, None)
        return None

    def _source(self, directory: bytes, stem: bytes, package: bytes | None) -> _Found:
        source = self._files.names(directory)[stem + b".py"]
        cache = self._files.names(posixpath.join(directory, b"__pycache__"))
        return _Found(package, source, cache.get(b"%s.%s.pyc" % (stem, self._tag)))


def _prefix(interpreter: bytes) -> bytes:
    return posixpath.dirname(posixpath.dirname(interpreter))


def _site(version: bytes, interpreter: bytes) -> Iterator[bytes]:
    """The directories that an interpreter searches, by where it is."""
    prefix = _prefix(interpreter)
    library = posixpath.join(prefix, b"lib", version)
    yield library
    yield posixpath.join(library, b"lib-dynload")
    yield posixpath.join(library, b"site-packages")
    if prefix == b"/usr":  # Debian's, and what is installed beside it
        yield posixpath.join(b"/usr/local/lib", version, b"dist-packages")
        yield b"/usr/lib/python3/dist-packages"
