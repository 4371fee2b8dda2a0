"""Opening, searching and checking the file indexes of large images, which are made up."""

from __future__ import annotations

import gc
import random
import stat
import statistics
import time
from typing import TYPE_CHECKING, NamedTuple

from index import format as fbx
from index.erofs.validate import validate
from index.file import FileIndex
from index.tables import LayerTable
from snapshotter.bench.synthetic import make_index
from snapshotter.bench.tables import Cell, Table
from snapshotter.bench.timing import drop_caches, once

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from index.erofs.reader import Image

_LOOKUPS = 20_000
_SEED = 1


class _Opened(NamedTuple):
    """Seconds that one opening took, and the lookup of one path after it."""

    whole: float
    first_lookup: float


class _Parts(NamedTuple):
    """Seconds of an opening that go into its parts, page cache warm."""

    checksums: float
    tables: float


def opening(counts: Sequence[int], directory: Path, samples: int) -> tuple[Table, Table]:
    """Indexes of images with so many files: opened, searched, and taken in from outside.

    Needs root. Files in `directory` are removed again.
    """
    opened: list[tuple[Cell, ...]] = []
    taken: list[tuple[Cell, ...]] = []
    for count in counts:
        path = directory / f"synthetic-{count}.fbx"
        index = make_index(count)
        path.write_bytes(index.expanded)
        taken.append((count, *_take_in(index)))
        del index
        opened += [(count, what, 1e3 * seconds) for what, seconds in _open(path, samples).items()]
        path.unlink()
    return (
        Table(
            "Opening a file index",
            ("files", "what", "ms"),
            tuple(opened),
            f"Medians of {samples} rounds. The lookup goes down from the root to one file.",
        ),
        Table(
            "Taking in a file index from outside",
            (
                "files",
                "inodes",
                "expanded MB",
                "travelling MB",
                "unpack, compare digests s",
                "validate s",
                "lookup µs",
                "inode µs",
            ),
            tuple(taken),
            f"Once each; lookups and inodes are means of {_LOOKUPS} at random.",
        ),
    )


def _open(path: Path, samples: int) -> dict[str, float]:
    """What is measured to seconds."""
    names = _path_to_a_file(FileIndex.open(path).tree)
    openings: dict[str, list[_Opened]] = {"warm": [], "dropped": []}
    parts: list[_Parts] = []
    for _ in range(samples):
        parts.append(_time_parts(path))
        for cache, opened in openings.items():
            gc.collect()  # pages that are still mapped cannot be dropped
            if cache == "dropped":
                drop_caches()
            opened.append(_open_once(path, names))
    warm = _Opened(*map(statistics.median, zip(*openings["warm"], strict=True)))
    dropped = _Opened(*map(statistics.median, zip(*openings["dropped"], strict=True)))
    of_it = _Parts(*map(statistics.median, zip(*parts, strict=True)))
    return {
        "open, page cache warm": warm.whole,
        "of it: compare checksums": of_it.checksums,
        "of it: check layer tables": of_it.tables,
        "first lookup, warm": warm.first_lookup,
        "open, page cache dropped": dropped.whole,
        "first lookup after it": dropped.first_lookup,
    }


def _time_parts(path: Path) -> _Parts:
    """The two parts that take longest, each by itself and after the other."""
    index = FileIndex.open(path)
    sections = fbx.read(index.expanded)
    checksums = once(lambda: fbx.intact(index.expanded, sections))
    tables = once(lambda: list(map(LayerTable.check, index.layers)))
    return _Parts(checksums.seconds, tables.seconds)


def _open_once(path: Path, names: Sequence[bytes]) -> _Opened:
    start = time.perf_counter()
    index = FileIndex.open(path)
    opened = time.perf_counter()
    nid: int | None = index.tree.root
    for name in names:
        assert nid is not None
        nid = index.tree.lookup(nid, name)
    return _Opened(opened - start, time.perf_counter() - opened)


def _path_to_a_file(image: Image) -> list[bytes]:
    """The names on the way to one, always in the last directory."""
    names: list[bytes] = []
    nid = image.root
    while stat.S_ISDIR(image.inode(nid).mode):
        *_, (_, name, nid, _) = image.readdir(nid)
        names.append(name)
    return names


def _take_in(index: FileIndex) -> tuple[Cell, ...]:
    """All that `discovery.accept` does, and lookups, as cells of the table."""
    packed = index.packed()
    sizes = [table.raw_size for table in index.layers]
    image = index.tree
    pairs = _random_names(image)
    return (
        image.inode_count,
        len(index.expanded) / 1e6,
        len(packed) / 1e6,
        once(lambda: FileIndex.load(packed)).seconds,
        once(lambda: validate(image, sizes)).seconds,
        _mean(lambda: [image.lookup(nid, name) for nid, name, _ in pairs], pairs),
        _mean(lambda: [image.inode(child) for _, _, child in pairs], pairs),
    )


def _mean(work: Callable[[], object], items: Sequence[object]) -> float:
    """Microseconds for each item."""
    return 1e6 * once(work).seconds / len(items)


def _random_names(image: Image) -> list[tuple[int, bytes, int]]:
    """(directory, name, what it leads to), from all over the tree."""
    found: list[tuple[int, bytes, int]] = []
    todo = [image.root]
    while todo:
        nid = todo.pop()
        for _, name, child, _ in image.readdir(nid):
            found.append((nid, name, child))
            if stat.S_ISDIR(image.inode(child).mode):
                todo.append(child)
    return random.Random(_SEED).choices(found, k=_LOOKUPS)  # noqa: S311  (a measurement)
