"""What programs do with a file tree, as plain system calls.

Everything is decided before: the same calls in the same order go to whichever tree is measured, so
what Python itself costs is equal on all sides.
"""

from __future__ import annotations

import os
import random
import stat
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from snapshotter.bench.errors import BenchError
from snapshotter.bench.timing import Timing, once

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

_SMALL = 64 << 10  # bytes of the largest file that counts as small
_LARGE = 1 << 20  # bytes of the smallest that counts as large
_BLOCK = 128 << 10  # bytes of a sequential read: what cp and cat ask for
_PAGE = 4 << 10  # bytes of a random read
_RANDOM_READS = 2_000
_MAX_OPEN = 200  # large files that are open for random reads; the usual limit is 1024 descriptors
_SEED = 1

SizedPath = tuple[str, int]  # size in bytes


@dataclass(frozen=True, slots=True)
class Files:
    """What is in a tree: how many names, and the regular files, by path below its root."""

    names: int
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
    regular: list[SizedPath] = []
    count = 0
    for parent, below, names in os.walk(root):
        below.sort()
        count += len(below) + len(names)
        for name in sorted(names):
            path = os.path.join(parent, name)
            status = os.lstat(path)
            if stat.S_ISREG(status.st_mode):
                regular.append((os.path.relpath(path, root), status.st_size))
    files = Files(count, tuple(regular))
    if not files.large:
        raise BenchError(f"the files to measure with are all below {_LARGE >> 20} MiB")
    return files


@dataclass(frozen=True, slots=True)
class Workload:
    """`amount` units of work on a tree.

    `run(root, before)` opens what it needs, calls `before` (which drops the page cache, say) and
    times what comes then. Raises BenchError if a file is not as long as it has to be.
    """

    name: str
    unit: str
    amount: float
    run: Callable[[Path, Callable[[], object]], Timing]


def workloads(files: Files) -> tuple[Workload, ...]:
    """For any tree that has these files."""
    return (
        Workload("walk, stat everything", "names/s", files.names, _walk),
        Workload(
            f"open and read files to {_SMALL >> 10} KiB",
            "files/s",
            len(files.small),
            partial(_read_files, files.small),
        ),
        Workload(
            "read large files in order",
            "MB/s",
            sum(size for _, size in files.large) / 1e6,
            partial(_read_files, files.large),
        ),
        Workload(
            f"random reads of {_PAGE >> 10} KiB",
            "reads/s",
            _RANDOM_READS,
            partial(_read_random, files.large[:_MAX_OPEN]),
        ),
    )


def read_everything(root: Path, files: Files) -> None:
    """Every byte of every file, once."""
    for path, size in files.regular:
        _read(os.path.join(root, path), size)


def _walk(root: Path, before: Callable[[], object]) -> Timing:
    def walk() -> None:
        todo = [os.fspath(root)]
        while todo:
            with os.scandir(todo.pop()) as entries:
                paths = [entry.path for entry in entries]
            todo += [path for path in paths if stat.S_ISDIR(os.lstat(path).st_mode)]

    before()
    return once(walk)


def _read_files(paths: Sequence[SizedPath], root: Path, before: Callable[[], object]) -> Timing:
    whole = [(os.path.join(root, path), size) for path, size in paths]

    def read() -> None:
        for path, size in whole:
            _read(path, size)

    before()
    return once(read)


def _read_random(large: Sequence[SizedPath], root: Path, before: Callable[[], object]) -> Timing:
    """Of files that are open already."""
    rng = random.Random(_SEED)  # noqa: S311  (a measurement)
    with ExitStack() as opened:
        descriptors = []
        for path, size in large:
            descriptor = os.open(root / path, os.O_RDONLY)
            opened.callback(os.close, descriptor)
            descriptors.append((descriptor, size // _PAGE))
        places = []
        for descriptor, pages in rng.choices(descriptors, k=_RANDOM_READS):
            places.append((descriptor, rng.randrange(pages) * _PAGE))

        def read() -> None:
            for descriptor, offset in places:
                if len(os.pread(descriptor, _PAGE, offset)) != _PAGE:
                    raise BenchError(f"a random read in {root} came back short")

        before()
        return once(read)


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
