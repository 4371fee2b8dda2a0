"""Disk usage, counted as du(1) and containerd do."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
import trio

from snapshotter.containerd.usage import tree_usage
from snapshotter.store.errors import StoreError

if TYPE_CHECKING:
    from pathlib import Path

    from snapshotter.containerd.snapshots import Usage


async def measure(path: Path) -> Usage:
    return await trio.to_thread.run_sync(tree_usage, path)


async def test_it_is_what_du_says(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "file").write_bytes(b"x" * 100_000)
    (tmp_path / "a" / "b" / "same").hardlink_to(tmp_path / "a" / "file")
    (tmp_path / "link").symlink_to("/usr")
    os.mkfifo(tmp_path / "fifo")
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(10 * 1024 * 1024)
    du = await trio.run_process(["du", "--block-size=1", "-s", str(tmp_path)], capture_stdout=True)
    usage = await measure(tmp_path)
    assert usage.size == int(du.stdout.split()[0])
    assert usage.inodes == 7  # with the root; the hard link is no inode of its own


async def test_an_empty_directory_is_one_inode(tmp_path: Path) -> None:
    assert (await measure(tmp_path)).inodes == 1


async def test_a_missing_directory_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="cannot count"):
        await measure(tmp_path / "nothing")


async def test_what_vanishes_meanwhile_is_not_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gone").mkdir()
    (tmp_path / "stays").mkdir()
    really = os.scandir

    def scandir(path: str) -> object:
        if path == str(tmp_path / "gone"):
            (tmp_path / "gone").rmdir()
        return really(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert (await measure(tmp_path)).inodes == 3  # it was there when its parent was read


async def test_it_stops_when_the_caller_is_cancelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(5):
        (tmp_path / str(number)).mkdir()
    seen = []
    really = os.scandir
    with trio.CancelScope() as scope:

        def scandir(path: str) -> object:
            seen.append(path)
            trio.from_thread.run_sync(scope.cancel)
            return really(path)

        monkeypatch.setattr(os, "scandir", scandir)
        await measure(tmp_path)
    assert scope.cancelled_caught
    assert len(seen) == 1
