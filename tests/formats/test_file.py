"""An index in a file: mapped, checked once, and in memory only where it is read."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

import pytest

from index import file as file_module
from index.erofs.layout import SLOT_SIZE
from index.errors import IntegrityError
from index.file import FileIndex
from index.format import Section, places
from snapshotter.bench.coldstart.residency import resident as cached
from snapshotter.bench.synthetic import make_index


@pytest.fixture(scope="module")
def made() -> bytes:
    return bytes(make_index(3000).expanded)


@pytest.fixture
def path(made: bytes, tmp_path: Path) -> Path:
    path = tmp_path / "an.index"
    path.write_bytes(made)
    return path


def resident(path: Path) -> list[int]:
    """KiB in memory of each mapping of a file in this process (proc_pid_smaps(5))."""
    smaps = Path("/proc/self/smaps").read_text()
    return [
        int(size)
        for size in re.findall(rf"{re.escape(str(path))}\n(?:.+\n)*?Rss: +(\d+) kB", smaps)
    ]


def test_an_index_that_was_opened_takes_memory_where_it_is_read(path: Path) -> None:
    index = FileIndex.open(path)
    assert resident(path) == [0]
    assert index.tree.inode(index.tree.root).nlink > 1
    (some,) = resident(path)
    assert 0 < some < path.stat().st_size >> 10
    index.trim()
    assert resident(path) == [0]
    assert index.tree.inode(index.tree.root).nlink > 1


def test_what_was_checked_and_not_written_to_is_not_checked_again(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = FileIndex.open(path)
    assert first.state is not None

    def refuse(*_: object) -> bool:
        raise AssertionError("it was checked again")

    monkeypatch.setattr(file_module.fbx, "intact", refuse)
    assert FileIndex.open(path, first.state).digest == first.digest


def test_what_was_checked_is_opened_again_with_little_from_the_disk(path: Path) -> None:
    """What a mount needs of it, which is asked for at once; not what lies around that."""
    first = FileIndex.open(path)
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    assert cached(path) == []
    index = FileIndex.open(path, first.state)
    tree = places(index.expanded)[Section.TREE].start
    root = tree + index.tree.meta_start + SLOT_SIZE * index.tree.root
    deadline = time.monotonic() + 20
    while not all(any(a <= at < b for a, b in cached(path)) for at in (0, tree, root)):
        assert time.monotonic() < deadline
    assert sum(end - start for start, end in cached(path)) < path.stat().st_size / 2


@pytest.mark.parametrize("how", ["in place", "replaced"])
def test_what_was_written_to_since_is_checked_again(path: Path, how: str) -> None:
    """Even by somebody who sets the times back."""
    first = FileIndex.open(path)
    status = path.stat()
    place = first.tree.meta_start + 100
    data = bytearray(path.read_bytes())
    data[place + path.read_bytes().index(bytes(first.tree.buffer[:2048]))] ^= 1
    if how == "replaced":
        path.rename(path.with_name("kept"))  # so that the new one has another inode
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(IntegrityError, match="damaged"):
        FileIndex.open(path, first.state)
