"""The SQLite file under the snapshotter: its schema, transactions, and what its errors mean."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from typing import TYPE_CHECKING

from snapshotter.store.durable import sync_directory
from snapshotter.store.errors import StoreError, StoreFullError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

VERSION = 1  # in the file's user_version; 0 is an empty file
_PATIENCE = 5.0  # seconds for another process (a person's sqlite3) to end its transaction; a guess

# Times are nanoseconds since the epoch, sizes are bytes. AUTOINCREMENT: an id names a directory, so
# that of a removed snapshot must not come back while its directory is being deleted.
_SCHEMA = """
CREATE TABLE snapshots (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    name TEXT NOT NULL UNIQUE,
    parent INTEGER REFERENCES snapshots (id),
    kind TEXT NOT NULL CHECK (kind IN ('view', 'active', 'committed')),
    created_ns INTEGER NOT NULL,
    updated_ns INTEGER NOT NULL,
    inodes INTEGER NOT NULL DEFAULT 0,
    size INTEGER NOT NULL DEFAULT 0
);
CREATE INDEX children ON snapshots (parent);

CREATE TABLE labels (
    snapshot INTEGER NOT NULL REFERENCES snapshots (id) ON DELETE CASCADE,
    key TEXT NOT NULL,
    value TEXT NOT NULL,
    PRIMARY KEY (snapshot, key)
) WITHOUT ROWID;
CREATE INDEX labelled ON labels (key, value);

-- Committed snapshots whose content is layers 1 to depth of an image, served lazily.
CREATE TABLE lazy (
    snapshot INTEGER PRIMARY KEY REFERENCES snapshots (id) ON DELETE CASCADE,
    image TEXT NOT NULL,
    depth INTEGER NOT NULL,
    content_key TEXT NOT NULL,
    top INTEGER NOT NULL
);
CREATE INDEX lazy_image ON lazy (image);
CREATE INDEX lazy_content ON lazy (content_key);

-- Images whose layers are unpacked because they are not served lazily, and why.
CREATE TABLE fallbacks (
    id INTEGER PRIMARY KEY,
    reference TEXT NOT NULL,
    image TEXT NOT NULL,
    kind TEXT NOT NULL,
    reason TEXT NOT NULL,
    layers INTEGER NOT NULL,
    latest_ns INTEGER NOT NULL,
    UNIQUE (reference, kind, reason)
);
"""


class Database:
    """One file through one connection, which is guarded by a lock.

    One connection, because SQLite lets one writer at a time work anyway, reads take well under a
    millisecond, and threads with a connection each would meet SQLITE_BUSY. A lock, because a
    transaction belongs to its connection: two threads would find themselves in the same one.

    Thread-safe, and it waits for the disk: use it from worker threads.
    """

    def __init__(self, path: Path) -> None:
        """Open the file, make it if need be, and check it. Raises StoreError."""
        self._path = path
        self._lock = threading.Lock()
        new = not path.exists()
        with self._explained():
            self._connection = sqlite3.connect(
                path, timeout=_PATIENCE, isolation_level=None, check_same_thread=False
            )
        try:
            with self._explained():
                self._set_up()
            if new:
                sync_directory(path.parent)
        except BaseException:
            self._connection.close()
            raise

    def close(self) -> None:
        """Release the file; closing twice is fine."""
        with self._lock:
            self._connection.close()

    @contextlib.contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """Nothing changes within the block. Raises StoreError."""
        with self._lock, self._explained():
            yield self._connection

    @contextlib.contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """All changes of the block are on disk after it, or none if it is left by an exception.

        Raises StoreError.
        """
        with self._lock, self._explained():
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException:
                with contextlib.suppress(sqlite3.Error):  # some errors have rolled back by now
                    self._connection.execute("ROLLBACK")
                raise

    def _set_up(self) -> None:
        run = self._connection.execute
        version = run("PRAGMA user_version").fetchone()[0]
        if version > VERSION:
            raise StoreError(
                f"{self._path} has version {version}, and this FirstByte knows {VERSION}",
                hint="a newer FirstByte made it: go on with that one",
            )
        damage = run("PRAGMA quick_check(1)").fetchone()[0]
        if damage != "ok":
            raise self._damaged(damage)
        run("PRAGMA journal_mode = WAL")
        run("PRAGMA synchronous = FULL")  # a commit is on disk when it returns
        run("PRAGMA foreign_keys = ON")
        if version == 0:
            # In one transaction: a crash leaves an empty file, which is version 0 again.
            self._connection.executescript(
                f"BEGIN IMMEDIATE; {_SCHEMA} PRAGMA user_version = {VERSION}; COMMIT;"
            )

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise self._explain(error) from error

    def _explain(self, error: sqlite3.Error) -> StoreError:
        code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF  # without details
        if code == sqlite3.SQLITE_FULL:
            return StoreFullError(
                f"cannot write {self._path}: no space is left on the disk",
                hint="free some space there",
            )
        if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            return self._damaged(str(error))
        if code == sqlite3.SQLITE_BUSY:
            return StoreError(
                f"{self._path} is in use by another process",
                hint=f"end what uses it (fuser -v {self._path} lists it)",
            )
        return StoreError(
            f"{self._path}: {error}", hint="the kernel log may say what is wrong with the disk"
        )

    def _damaged(self, details: str) -> StoreError:
        return StoreError(
            f"{self._path} is damaged ({details})",
            hint="restore it from a backup; or stop containerd and FirstByte, move its directory "
            "away, and remove and pull the images of this snapshotter again",
        )
