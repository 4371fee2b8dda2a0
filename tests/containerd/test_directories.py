"""Directories of snapshots: made as a whole, deleted without touching anything else."""

from __future__ import annotations

import fcntl
import os
import struct
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from snapshotter.containerd.directories import Directories
from snapshotter.mounts import syscalls
from snapshotter.mounts.syscalls import MountFlag
from snapshotter.store.errors import StoreError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_GETFLAGS, _SETFLAGS = 0x80086601, 0x40086602  # FS_IOC_*FLAGS of linux/fs.h
_IMMUTABLE = 0x10


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "snapshots"


@pytest.fixture
def directories(root: Path) -> Directories:
    return Directories(root)


def make(directories: Directories, snapshot: int, *, writable: bool = True) -> Path:
    with directories.draft(None, writable=writable) as draft:
        draft.settle(snapshot)
    return directories.path(snapshot)


def set_immutable(path: Path, *, immutable: bool) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        (flags,) = struct.unpack("i", fcntl.ioctl(handle, _GETFLAGS, bytes(4)))
        flags = flags | _IMMUTABLE if immutable else flags & ~_IMMUTABLE
        fcntl.ioctl(handle, _SETFLAGS, struct.pack("i", flags))
    finally:
        os.close(handle)


def test_an_active_one_has_a_work_directory(directories: Directories) -> None:
    path = make(directories, 1)
    assert {entry.name: entry.stat().st_mode & 0o7777 for entry in path.iterdir()} == {
        "fs": 0o755,
        "work": 0o711,
    }
    assert path.stat().st_mode & 0o7777 == 0o700
    assert [entry.name for entry in make(directories, 2, writable=False).iterdir()] == ["fs"]


def test_the_umask_changes_nothing(directories: Directories) -> None:
    before = os.umask(0o077)
    try:
        path = make(directories, 1)
    finally:
        os.umask(before)
    assert (path / "fs").stat().st_mode & 0o7777 == 0o755


@pytest.mark.root
def test_the_owner_is_the_one_that_is_asked_for(directories: Directories) -> None:
    with directories.draft((1000, 2000), writable=True) as draft:
        draft.settle(1)
    status = directories.layer(1).stat()
    assert (status.st_uid, status.st_gid) == (1000, 2000)


@pytest.mark.parametrize("settled", [False, True])
def test_a_failed_draft_leaves_nothing(
    directories: Directories, root: Path, *, settled: bool
) -> None:
    with pytest.raises(ZeroDivisionError), failing_draft(directories, settled=settled):
        raise ZeroDivisionError
    assert list(root.iterdir()) == []


@contextmanager
def failing_draft(directories: Directories, *, settled: bool) -> Iterator[None]:
    with directories.draft(None, writable=True) as draft:
        if settled:
            draft.settle(1)
        yield


def test_a_directory_that_is_there_is_never_replaced(directories: Directories, root: Path) -> None:
    path = make(directories, 1)
    (path / "fs" / "file").write_text("content")
    with pytest.raises(StoreError, match="cannot create"):
        make(directories, 1)
    assert (path / "fs" / "file").read_text() == "content"
    assert [entry.name for entry in root.iterdir()] == ["1"]


def test_what_is_being_made_is_not_listed(directories: Directories, root: Path) -> None:
    (root / "new-left-by-a-crash").mkdir()
    with directories.draft(None, writable=True) as draft:
        assert directories.names() == {"new-left-by-a-crash"}
        draft.settle(1)
        assert directories.names() == {"new-left-by-a-crash", "1"}


def test_missing_are_those_without_files(directories: Directories) -> None:
    make(directories, 1)
    make(directories, 2)
    (directories.layer(2)).rmdir()
    assert directories.missing([1, 2, 3]) == [2, 3]


def test_deleting_follows_no_links(directories: Directories, root: Path, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("content")
    path = make(directories, 1)
    (path / "fs" / "to-directory").symlink_to(precious)
    (path / "fs" / "to-file").symlink_to(precious / "file")
    (path / "fs" / "hard").hardlink_to(precious / "file")
    (root / "link").symlink_to(precious)
    assert directories.delete("1")
    assert directories.delete("link")
    assert (precious / "file").read_text() == "content"
    assert list(root.iterdir()) == []


@pytest.mark.root
def test_deleting_enters_no_mount(
    directories: Directories, root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    precious = tmp_path / "precious"  # on the same device: only the mount table tells
    (precious / "inner").mkdir(parents=True)
    (precious / "inner" / "file").write_text("content")
    path = make(directories, 1)
    point = path / "fs" / "a" / "b"
    point.mkdir(parents=True)
    (path / "fs" / "other").write_text("goes")
    syscalls.bind(precious, point)
    try:
        assert not directories.delete("1")
        assert not directories.delete(next(iter(directories.names())))
        assert (precious / "inner" / "file").read_text() == "content"
        assert len(caplog.records) == 1
        assert "Device or resource busy" in caplog.text
        assert not path.exists()
    finally:
        (mounted,) = root.glob("*/*/b")
        syscalls.unmount(mounted)
    assert directories.delete(next(iter(directories.names())))
    assert list(root.iterdir()) == []


@pytest.mark.root
def test_a_snapshot_that_is_a_mount_point_stays(
    directories: Directories, root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = make(directories, 1)
    syscalls.mount("test", path, "tmpfs", MountFlag.NO_DEVICES, "size=64k")
    try:
        (path / "file").write_text("content")
        assert not directories.delete("1")
        assert not directories.delete("1")
        assert (path / "file").read_text() == "content"
        assert [entry.name for entry in root.iterdir()] == ["1"]
        assert len(caplog.records) == 1
    finally:
        syscalls.unmount(path)


@pytest.mark.root
def test_what_is_immutable_stays_with_one_line_in_the_log(
    directories: Directories, root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = make(directories, 1)
    (path / "fs" / "goes").write_text("content")
    (path / "fs" / "stays").write_text("content")
    set_immutable(path / "fs" / "stays", immutable=True)
    try:
        assert not directories.delete("1")
        for _ in range(3):
            (left,) = directories.names()
            assert not directories.delete(left)
        assert "Operation not permitted" in caplog.text
        assert len(caplog.records) == 1
        assert [path.name for path in root.rglob("*") if path.is_file()] == ["stays"]
    finally:
        (stays,) = root.glob("*/*/stays")
        set_immutable(stays, immutable=False)
    assert directories.delete(left)
    assert list(root.iterdir()) == []


def test_nesting_beyond_any_path_is_deleted(directories: Directories, root: Path) -> None:
    path = make(directories, 1)
    here = os.open(path / "fs", os.O_RDONLY | os.O_DIRECTORY)
    for _ in range(1500):  # paths end at 4096 bytes, and Python's recursion at 1000
        os.mkdir("nested-directory", dir_fd=here)
        below = os.open("nested-directory", os.O_RDONLY | os.O_DIRECTORY, dir_fd=here)
        os.close(here)
        here = below
    os.close(os.open("file", os.O_CREAT | os.O_WRONLY, dir_fd=here))
    os.close(here)
    assert directories.delete("1")
    assert list(root.iterdir()) == []


def test_deleting_what_is_not_there_is_fine(directories: Directories, root: Path) -> None:
    assert directories.delete("7")
    assert directories.delete("gone-7")
    assert list(root.iterdir()) == []


def test_a_stray_file_is_deleted(directories: Directories, root: Path) -> None:
    (root / "stray").write_text("content")
    assert directories.delete("stray")
    assert list(root.iterdir()) == []
