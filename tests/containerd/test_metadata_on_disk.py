"""The metadata store after kills, beside others, damaged, and on a disk that is full."""

from __future__ import annotations

import contextlib
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from snapshotter.containerd.database import VERSION, Database
from snapshotter.containerd.metadata import Metadata
from snapshotter.mounts import syscalls
from snapshotter.mounts.syscalls import MountFlag
from snapshotter.store.errors import StoreError, StoreFullError
from tests.support.snapshot_metadata import create


def test_everything_is_there_after_a_kill(tmp_path: Path) -> None:
    script = f"""
import os, pathlib
from snapshotter.containerd.database import Database
from snapshotter.containerd.metadata import Chain, Metadata
from snapshotter.containerd.snapshots import Kind
metadata = Metadata(Database(pathlib.Path({str(tmp_path / "metadata.db")!r})))
metadata.create(Kind.ACTIVE, "key", "", {{"a": "1"}}, planned=Chain(), settle=lambda _: None)
os._exit(9)
"""
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", script], cwd=root).returncode == 9
    database = Database(tmp_path / "metadata.db")
    assert Metadata(database).record("key").info.labels == {"a": "1"}
    database.close()


def test_a_newer_version_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "metadata.db"
    with sqlite3.connect(path) as connection:
        connection.execute(f"PRAGMA user_version = {VERSION + 1}")
    connection.close()
    before = path.read_bytes()
    with pytest.raises(StoreError, match=r"newer FirstByte made it"):
        Database(path)
    assert path.read_bytes() == before


def test_a_file_that_is_no_database_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metadata.db"
    path.write_bytes(b"no database, but of some length" * 100)
    with pytest.raises(StoreError, match=r"metadata\.db is damaged .*pull the images"):
        Database(path)


def test_damage_within_is_found_when_it_is_opened(tmp_path: Path) -> None:
    path = tmp_path / "metadata.db"
    database = Database(path)
    metadata = Metadata(database)
    for n in range(100):
        create(metadata, f"key {n}", labels={"label": "x" * 200})
    database.close()
    data = bytearray(path.read_bytes())
    for page in range(2 * 4096, len(data) - 4096, 4096):
        data[page + 8 : page + 300] = b"\xff" * 292
    path.write_bytes(data)
    with pytest.raises(StoreError, match="is damaged"):
        Database(path)


def test_a_locked_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    path = tmp_path / "metadata.db"
    database = Database(path)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    try:
        with database.reading() as run:
            run.execute("PRAGMA busy_timeout = 10")
        with pytest.raises(StoreError, match="in use by another process"):
            create(Metadata(database), "key")
    finally:
        other.close()
    create(Metadata(database), "key")
    database.close()


@pytest.mark.root
def test_a_full_disk_is_said_and_changes_nothing(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    syscalls.mount("test", disk, "tmpfs", MountFlag.NO_DEVICES, "size=1m")
    try:
        database = Database(disk / "metadata.db")
        metadata = Metadata(database)
        create(metadata, "key", labels={"a": "1"})
        fill(disk / "filler")
        with pytest.raises(StoreFullError, match="no space is left"):
            create_many(metadata)
        assert metadata.record("key").info.labels == {"a": "1"}
        (disk / "filler").unlink()
        create(metadata, "another")
        database.close()
    finally:
        syscalls.unmount(disk, detach=True)


def fill(path: Path) -> None:
    """Leave no space on the disk of a new file."""
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


def create_many(metadata: Metadata) -> None:
    """More than fits into the pages that the database has already."""
    for n in range(1000):
        create(metadata, f"key {n}", labels={"a": "x" * 4000})
