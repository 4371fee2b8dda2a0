"""What programs do with a file tree, as plain system calls.

Everything is decided before: the same calls in the same order go to whichever tree is measured, so
what Python itself costs is equal on all sides.
"""

from __future__ import annotations

import os
import random
import re
import stat
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from snapshotter.bench.errors import BenchError
from snapshotter.bench.timing import Timing, at_once

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

_SMALL = 64 << 10  # bytes of the largest file that counts as small
_LARGE = 1 << 20  # bytes of the smallest that counts as large
_BLOCK = 128 << 10  # bytes of a sequential read: what cp and cat ask for
_RANDOM_READS = {4 << 10: 4_000, 128 << 10: 1_000}  # by their size in bytes
_MAX_OPEN = 200  # large files that are open for random reads; the usual limit is 1024 descriptors
_JOBS = (1, 4)
_SEED = 1

# Of the standard library: those that import much of the rest of it.
_MODULES = (
    "asyncio",
    "concurrent.futures",
    "ctypes.util",
    "email.mime.multipart",
    "http.server",
    "logging.config",
    "multiprocessing.pool",
    "pydoc",
    "sqlite3",
    "tarfile",
    "unittest.mock",
    "urllib.request",
    "xml.dom.minidom",
    "xmlrpc.server",
)
_LIBRARY = re.compile(r"(usr/lib/python3\.\d+)/asyncio/__init__\.py")
_PATH = "import sys; sys.path.insert(0, {!r});"
_IMPORT = "import importlib, sys; [importlib.import_module(name) for name in sys.argv[1:]]"

SizedPath = tuple[str, int]  # size in bytes
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Files:
    """What is in a tree, by path below its root: how many names, directories, regular files."""

    names: int
    directories: tuple[str, ...]
    regular: tuple[SizedPath, ...]

    @property
    def small(self) -> tuple[SizedPath, ...]:
        return tuple(file for file in self.regular if file[1] <= _SMALL)

    @property
    def large(self) -> tuple[SizedPath, ...]:
        return tuple(file for file in self.regular if file[1] >= _LARGE)

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(size for _, size in self.regular)


def list_files(root: Path) -> Files:
    """What a tree has, in the order in which archivers list it. BenchError without large files."""
    directories: list[str] = []
    regular: list[SizedPath] = []
    count = 0
    for parent, below, names in os.walk(root):
        below.sort()
        count += len(below) + len(names)
        directories.append(os.path.relpath(parent, root))
        for name in sorted(names):
            path = os.path.join(parent, name)
            status = os.lstat(path)
            if stat.S_ISREG(status.st_mode):
                regular.append((os.path.relpath(path, root), status.st_size))
    files = Files(count, tuple(directories), tuple(regular))
    if not files.large:
        raise BenchError(f"the files to measure with are all below {_LARGE >> 20} MiB")
    return files


@dataclass(frozen=True, slots=True)
class Workload(Generic[_T]):
    """`amount` units of work on a tree: something is done to each of `items`, by `jobs` processes
    at once, of which each takes its share.

    `prepare(root, opened, items)` opens what that needs and gives the work itself, which raises
    BenchError if a file is not as long as it has to be.
    """

    name: str
    unit: str
    amount: float
    jobs: int
    items: Sequence[_T]
    prepare: Callable[[Path, ExitStack, Sequence[_T]], Callable[[], None]]

    def run(self, root: Path, before: Callable[[], object]) -> Timing:
        """Prepare, call `before` (which drops the page cache, say), and time what comes then."""
        with ExitStack() as opened:
            shares = (self.items[job :: self.jobs] for job in range(self.jobs))
            works = [self.prepare(root, opened, share) for share in shares]
            before()
            return at_once(works)


def workloads(files: Files) -> tuple[Workload[Any], ...]:
    """For any tree that has these files."""
    folders, small, large = files.directories, files.small, files.large
    made: list[Workload[Any]] = [
        Workload("list directories", "names/s", files.names, 1, folders, _list)
    ]
    made += [
        Workload("list and stat everything", "names/s", files.names, jobs, folders, _stat)
        for jobs in _JOBS
    ]
    name = f"open and read files to {_SMALL >> 10} KiB"
    made += [Workload(name, "files/s", len(small), jobs, small, _read_files) for jobs in _JOBS]
    size = sum(size for _, size in large) / 1e6
    made.append(Workload("read large files in order", "MB/s", size, 1, large, _read_files))
    for length, count in _RANDOM_READS.items():
        name = f"random reads of {length >> 10} KiB"
        places, read = _random_places(large[:_MAX_OPEN], length, count), partial(_read_at, length)
        made += [Workload(name, "reads/s", count, jobs, places, read) for jobs in _JOBS]
    libraries = [match[1] for path, _ in files.regular if (match := _LIBRARY.fullmatch(path))]
    if libraries:
        prepare = partial(_import, libraries[0])
        made.append(Workload("start Python, import much", "starts/s", 1, 1, _MODULES, prepare))
    return tuple(made)


def read_everything(root: Path, files: Files) -> None:
    """Every byte of every file, once."""
    for path, size in files.regular:
        _read(os.path.join(root, path), size)


def _list(root: Path, _: ExitStack, directories: Sequence[str]) -> Callable[[], None]:
    paths = [os.path.join(root, path) for path in directories]

    def work() -> None:
        for path in paths:
            os.listdir(path)

    return work


def _stat(root: Path, _: ExitStack, directories: Sequence[str]) -> Callable[[], None]:
    paths = [os.path.join(root, path) for path in directories]

    def work() -> None:
        for path in paths:
            with os.scandir(path) as entries:
                for entry in entries:
                    os.lstat(entry.path)

    return work


def _read_files(root: Path, _: ExitStack, paths: Sequence[SizedPath]) -> Callable[[], None]:
    whole = [(os.path.join(root, path), size) for path, size in paths]

    def work() -> None:
        for path, size in whole:
            _read(path, size)

    return work


def _random_places(files: Sequence[SizedPath], length: int, count: int) -> list[SizedPath]:
    """Paths, and offsets in them that are multiples of `length`."""
    rng = random.Random(_SEED)  # noqa: S311  (a measurement)
    chosen = rng.choices(files, k=count)
    return [(path, rng.randrange(size // length) * length) for path, size in chosen]


def _read_at(
    length: int, root: Path, opened: ExitStack, places: Sequence[SizedPath]
) -> Callable[[], None]:
    """Of files that are open already."""
    descriptors = {path: os.open(root / path, os.O_RDONLY) for path in {path for path, _ in places}}
    for descriptor in descriptors.values():
        opened.callback(os.close, descriptor)
    reads = [(descriptors[path], offset) for path, offset in places]

    def work() -> None:
        for descriptor, offset in reads:
            if len(os.pread(descriptor, length, offset)) != length:
                raise BenchError(f"a random read in {root} came back short")

    return work


def _import(library: str, root: Path, _: ExitStack, modules: Sequence[str]) -> Callable[[], None]:
    """In a process of its own, whose standard library is the tree's; so is what it compiles to."""
    command = [sys.executable, "-S", "-E", "-B", "-c", _PATH.format(str(root / library)) + _IMPORT]

    def work() -> None:
        done = subprocess.run([*command, *modules], capture_output=True, text=True, check=False)
        if done.returncode:
            raise BenchError(f"Python cannot import from {root}", hint=done.stderr[-300:])

    return work


def _read(path: str, size: int) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        offset = 0
        while data := os.pread(descriptor, _BLOCK, offset):
            offset += len(data)
    finally:
        os.close(descriptor)
    if offset != size:
        raise BenchError(f"{path} has {offset} bytes, not {size}")
