"""What is measured: directories of this machine, each packed as the tar of one layer."""

from __future__ import annotations

import os
import stat
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from snapshotter.bench.errors import BenchError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

DEFAULT_LIMIT = 64 << 20
"""Bytes of files taken from each of the default directories: large enough that start-up costs
vanish, small enough that a run takes minutes."""

_DEFAULTS = ("usr/lib/python3*", "usr/lib/gcc", "usr/bin")  # text, large binaries, small ones
_MTIME = 1_700_000_000  # seconds, for directories: theirs change with what else is in them


@dataclass(frozen=True, slots=True)
class RawLayer:
    """An uncompressed tar: its file, its size in bytes, and how many entries it has."""

    path: Path
    size: int
    entries: int


def default_directories() -> tuple[Path, ...]:
    """Those of the usual ones that this machine has."""
    return tuple(path for pattern in _DEFAULTS for path in sorted(Path("/").glob(pattern)))


def pack(directories: Sequence[Path], limit: int | None, target: Path) -> tuple[RawLayer, ...]:
    """Write a tar of each directory into `target`, with at most `limit` bytes of files in each.

    Files that do not fit any more are left out.
    Raises BenchError if there is nothing to pack.
    """
    layers = tuple(
        _pack(directory, limit, target / f"layer-{number}.tar")
        for number, directory in enumerate(directories)
    )
    if not any(layer.entries for layer in layers):
        raise BenchError("there are no files to measure with", hint="name some with --corpus")
    return layers


def _pack(directory: Path, limit: int | None, target: Path) -> RawLayer:
    entries = size = 0
    with tarfile.open(target, "w", format=tarfile.PAX_FORMAT) as tar:
        for path in _walk(directory):
            status = path.lstat()
            if stat.S_ISSOCK(status.st_mode):
                continue  # tars have none
            content = status.st_size if stat.S_ISREG(status.st_mode) else 0
            if limit is not None and size + content > limit:
                continue
            size += content
            member = tar.gettarinfo(path)  # finds hard links, takes the leading slash away
            entries += 1
            if member.isreg():
                with path.open("rb") as file:
                    tar.addfile(member, file)
            else:
                member.mtime = _MTIME if member.isdir() else member.mtime
                tar.addfile(member)
    return RawLayer(target, target.stat().st_size, entries)


def _walk(directory: Path) -> Iterator[Path]:
    """Everything below, directories before what is in them, names in order."""
    yield directory
    for parent, below, files in os.walk(directory):
        below.sort()
        for name in sorted([*below, *files]):
            yield Path(parent, name)
