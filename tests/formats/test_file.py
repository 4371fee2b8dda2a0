"""An index in a file: mapped, checked once, and in memory only where it is read."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from index import file as file_module
from index.errors import IntegrityError
from index.file import FileIndex
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
