"""The FUSE session itself: mounted, tuned, gone."""

from __future__ import annotations

import errno
import os
import threading
from contextlib import suppress
from pathlib import Path

import pytest

from index.errors import FirstByteError
from snapshotter.fuse import session
from snapshotter.fuse.session import FILE_SYSTEM
from snapshotter.mounts import syscalls
from snapshotter.mounts.errors import MountError
from snapshotter.mounts.syscalls import MountFlag
from snapshotter.mounts.table import mount_at
from tests.support.serving import MemoryLayer, directory, packed, served, view_of

pytestmark = pytest.mark.root


@pytest.fixture
def fs(tmp_path: Path) -> Path:
    path = tmp_path / "fs"
    path.mkdir()
    return path


def open_files() -> set[str]:
    folder = "/proc/self/fd"
    return {
        os.readlink(f"{folder}/{name}")
        for name in os.listdir(folder)
        if os.path.lexists(f"{folder}/{name}")
    }


def test_the_mount_is_ours_read_only_and_private_and_allows_programs_and_devices(fs: Path) -> None:
    with served(fs):
        entry = mount_at(fs)
        assert entry is not None
        assert entry.kind == FILE_SYSTEM.encode()
        assert entry.source == os.fsencode(fs)
        assert b"ro" in entry.options
        assert not {b"nosuid", b"nodev", b"noexec"} & set(entry.options)
        assert entry.optional == ()


def test_read_ahead_is_a_whole_request(fs: Path) -> None:
    with served(fs):
        entry = mount_at(fs)
        assert entry is not None
        device = "{}:{}".format(*entry.device)
        assert Path(f"/sys/class/bdi/{device}/read_ahead_kb").read_text().strip() == "1024"


def test_the_kernel_may_have_more_read_ahead_in_flight(fs: Path, tmp_path: Path) -> None:
    control = tmp_path / "control"
    control.mkdir()
    with served(fs):
        entry = mount_at(fs)
        assert entry is not None
        syscalls.mount("fusectl", control, "fusectl", MountFlag(0))
        try:
            limit = (control / str(entry.device[1]) / "max_background").read_text()
        finally:
            syscalls.unmount(control)
        assert limit.strip() == "256"


def test_nothing_is_left_after_a_session(fs: Path) -> None:
    """No mount, no open device, no thread but trio's cached workers; and again, and again."""
    before = open_files()
    for _ in range(3):
        with served(fs, view_of(directory({}), [])):
            assert os.listdir(fs) == ["image"]
        assert mount_at(fs) is None
        assert os.listdir(fs) == []
    assert "/dev/fuse" not in open_files() - before
    assert not [thread for thread in threading.enumerate() if "pyfuse" in thread.name]


def test_a_session_ends_with_files_still_open(fs: Path) -> None:
    files, raw = packed({b"f": b"content"})
    with served(fs, view_of(directory(files), [MemoryLayer(raw)])):
        file = os.open(fs / "image" / "f", os.O_RDONLY)
    with pytest.raises(OSError, match=os.strerror(errno.ENOTCONN)):
        os.read(file, 1)
    with suppress(OSError):  # closing asks the server too, which is gone
        os.close(file)
    assert mount_at(fs) is None


def test_a_session_that_is_unmounted_from_outside_ends(fs: Path) -> None:
    with served(fs) as mounted:
        assert mounted is not None
        syscalls.unmount(fs)
    assert mount_at(fs) is None


def test_a_mount_point_that_does_not_exist_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(FirstByteError, match="make the directory first"), served(tmp_path / "none"):
        pass


def test_without_the_device_the_error_says_what_to_load(
    fs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "_DEVICE", "/dev/no-such-device")
    with pytest.raises(MountError, match="modprobe fuse"), served(fs):
        pass
    assert mount_at(fs) is None
