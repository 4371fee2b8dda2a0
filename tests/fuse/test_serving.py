"""What happens when fetching fails, when images come and go, when many read at once."""

from __future__ import annotations

import errno
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from tests.support.serving import MemoryLayer, Served, directory, packed, regular, served, view_of

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.root


@pytest.fixture
def fs(tmp_path: Path) -> Path:
    path = tmp_path / "fs"
    path.mkdir()
    return path


def test_many_readers_at_once(fs: Path) -> None:
    contents = {b"%d" % number: os.urandom(100_000 + number) for number in range(20)}
    files, raw = packed(contents)
    layer = MemoryLayer(raw, local=False)
    with served(fs, view_of(directory(files), [layer])), ThreadPoolExecutor(16) as readers:
        names = sorted(contents) * 8
        found = readers.map(lambda name: (fs / "image" / name.decode()).read_bytes(), names)
        assert list(found) == [contents[name] for name in names]


def test_a_failed_read_is_an_error_once_and_no_memory_of_it_stays(
    fs: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither the server nor the kernel's page cache may remember a failure as an answer."""
    files, raw = packed({b"f": b"content" * 1000})
    layer = MemoryLayer(raw, local=False, failing=True)
    with served(fs, view_of(directory(files), [layer])):
        with (fs / "image" / "f").open("rb") as file:
            with pytest.raises(OSError, match=os.strerror(errno.EIO)):
                file.read()
            layer.failing = False
            file.seek(0)
            assert file.read() == b"content" * 1000
        assert (fs / "image" / "f").read_bytes() == b"content" * 1000
    complaints = [
        record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR
    ]
    assert complaints
    assert all(
        "example/image" in line and "at 0" in line and "the registry is away" in line
        for line in complaints
    )


def test_a_flood_of_failures_is_a_few_log_lines(fs: Path, caplog: pytest.LogCaptureFixture) -> None:
    files, raw = packed({b"%d" % number: b"x" for number in range(300)})
    layer = MemoryLayer(raw, local=False, failing=True)
    with served(fs, view_of(directory(files), [layer])):
        for name in files:
            with pytest.raises(OSError, match=os.strerror(errno.EIO)):
                (fs / "image" / name.decode()).read_bytes()
    assert 1 <= len([record for record in caplog.records if record.levelno >= logging.ERROR]) < 60


def test_a_damaged_inode_is_an_input_output_error_and_nothing_else_fails(fs: Path) -> None:
    view = view_of(directory({b"good": regular(0), b"bad": regular(0)}), [])
    nid = view.image.lookup(view.image.root, b"bad")
    assert nid is not None
    damaged = bytearray(view.image.buffer)
    start = view.image.meta_start + 32 * nid
    damaged[start : start + 2] = b"\xff\xff"
    view.image.buffer = bytes(damaged)
    with served(fs, view):
        with pytest.raises(OSError, match=os.strerror(errno.EIO)):
            os.stat(fs / "image" / "bad")
        assert os.stat(fs / "image" / "good").st_size == 0


def listed(mounted: Served) -> list[str]:
    return sorted(os.listdir(mounted.mountpoint))


def test_views_come_and_go(fs: Path) -> None:
    first = view_of(directory({b"f": regular(0)}), [], slot=1, name=b"first")
    second = view_of(directory({b"g": regular(0)}), [], slot=2, name=b"second")
    with served(fs, first) as mounted:
        assert listed(mounted) == ["first"]
        assert not (fs / "second").exists()
        mounted.views.add(second)
        assert listed(mounted) == ["first", "second"]
        assert os.listdir(fs / "second") == ["g"]
        held = os.open(fs / "first", os.O_RDONLY)
        try:
            mounted.views.remove(first)
            mounted.forget(b"first")
            assert listed(mounted) == ["second"]
            assert not (fs / "first").exists()
            with pytest.raises(OSError, match=os.strerror(errno.ESTALE)):
                os.stat("unknown", dir_fd=held)
        finally:
            os.close(held)


def test_a_name_that_is_used_again_shows_the_new_image(fs: Path) -> None:
    old_files, old_raw = packed({b"f": b"old"})
    new_files, new_raw = packed({b"f": b"new"})
    old = view_of(directory(old_files), [MemoryLayer(old_raw)], slot=1, name=b"image")
    new = view_of(directory(new_files), [MemoryLayer(new_raw)], slot=2, name=b"image")
    with served(fs, old) as mounted:
        assert (fs / "image" / "f").read_bytes() == b"old"
        mounted.views.remove(old)
        mounted.forget(b"image")
        mounted.views.add(new)
        assert (fs / "image" / "f").read_bytes() == b"new"
