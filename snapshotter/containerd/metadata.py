"""What snapshots there are: names, parents, kinds, labels, times, usage, and lazy places.

The rules are those of containerd's core/snapshots/storage/bolt.go, errors included.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from snapshotter.containerd.errors import (
    AlreadyExistsError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
)
from snapshotter.containerd.labels import TARGET
from snapshotter.containerd.lazy import LayerPlace
from snapshotter.containerd.snapshots import Info, Kind, Usage

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Callable, Mapping, Sequence

    from snapshotter.containerd.database import Database

_SELECT = """
SELECT s.id, s.kind, s.name, coalesce(p.name, ''), s.created_ns, s.updated_ns, s.inodes, s.size,
       lazy.image, lazy.depth, lazy.content_key, lazy.top
FROM snapshots s LEFT JOIN snapshots p ON p.id = s.parent LEFT JOIN lazy ON lazy.snapshot = s.id
"""

_LABELS = "SELECT snapshot, key, value FROM labels"
_LABELLED = "WHERE {} IN (SELECT snapshot FROM labels WHERE key = ? AND value = ?)"

# From a snapshot upwards to the root or to the first lazy one, which stands for all below it.
_CHAIN = """
WITH RECURSIVE chain (id, parent, steps, image, depth) AS (
    SELECT id, parent, 0, image, depth FROM snapshots LEFT JOIN lazy ON snapshot = id WHERE id = ?
    UNION ALL
    SELECT s.id, s.parent, steps + 1, lazy.image, lazy.depth
    FROM chain JOIN snapshots s ON s.id = chain.parent LEFT JOIN lazy ON lazy.snapshot = s.id
    WHERE chain.image IS NULL
)
SELECT id, image, depth FROM chain ORDER BY steps
"""


@dataclass(frozen=True, slots=True)
class Record:
    """A snapshot as it is stored. `usage` is of an ordinary committed one, else zero."""

    id: int
    info: Info
    usage: Usage
    place: LayerPlace | None  # None: it has a directory of its own


@dataclass(frozen=True, slots=True)
class Chain:
    """What lies below a snapshot: ordinary ones, nearest first, then layers of a lazy image.

    `depth` is how many of the image's layers; 0 if no lazy snapshot ends the chain.
    """

    ordinary: tuple[int, ...] = ()
    image: str = ""
    depth: int = 0


@dataclass(frozen=True, slots=True)
class Counts:
    """How many snapshots there are, by what they are for. Views are not told apart."""

    lazy_layers: int
    ordinary_layers: int
    containers: int  # active, and not a layer that is being unpacked
    views: int


class Metadata:
    """The snapshots in a database. Every change is on disk when the method returns.

    Thread-safe; methods wait for the disk. Besides what they say they raise StoreError.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._highest_id = 0  # that was given away, be it to a snapshot that came to nothing

    def chain_under(self, parent: str) -> Chain:
        """What a new snapshot on `parent` (a committed one's name, or empty) would stand on.

        Raises NotFoundError, InvalidArgumentError if the parent is not committed.
        """
        with self._database.reading() as run:
            return _chain(run, _parent_id(run, parent))

    def chain_of(self, key: str) -> tuple[Record, Chain]:
        """An active snapshot or a view, and what lies below it.

        Raises NotFoundError, FailedPreconditionError if it is committed.
        """
        with self._database.reading() as run:
            record = _record(run, key)
            if record.info.kind is Kind.COMMITTED:
                raise FailedPreconditionError(f"snapshot {key} is committed and has no mounts")
            parent = _parent_id(run, record.info.parent)
            return record, _chain(run, parent)

    def record(self, name: str) -> Record:
        """Raises NotFoundError."""
        with self._database.reading() as run:
            return _record(run, name)

    def all(self, label: tuple[str, str] | None = None) -> list[Record]:
        """Every snapshot, or those with a label of this name and value; in the order they were
        made."""
        condition, values = ("", ()) if label is None else (_LABELLED, label)
        with self._database.reading() as run:
            labels: dict[int, dict[str, str]] = {}
            query = f"{_LABELS} {condition.format('snapshot')}"
            for snapshot, key, value in run.execute(query, values):
                labels.setdefault(snapshot, {})[key] = value
            query = f"{_SELECT} {condition.format('s.id')} ORDER BY s.id"
            rows = run.execute(query, values).fetchall()
        return [_to_record(row, labels.get(row[0], {})) for row in rows]

    def ids(self) -> set[int]:
        """Of every snapshot; in it is also what was being made when the call was."""
        with self._database.reading() as run:
            return {row[0] for row in run.execute("SELECT id FROM snapshots")}

    def counts(self) -> Counts:
        with self._database.reading() as run:
            row = run.execute(
                "SELECT (SELECT count(*) FROM lazy),"
                " (SELECT count(*) FROM snapshots WHERE kind = 'committed'"
                "  AND id NOT IN (SELECT snapshot FROM lazy)),"
                " (SELECT count(*) FROM snapshots WHERE kind = 'active'"
                "  AND id NOT IN (SELECT snapshot FROM labels WHERE key = ?)),"
                " (SELECT count(*) FROM snapshots WHERE kind = 'view')",
                (TARGET,),
            ).fetchone()
        return Counts(*row)

    def create(
        self,
        kind: Kind,
        key: str,
        parent: str,
        labels: Mapping[str, str],
        *,
        planned: Chain,
        settle: Callable[[int], None],
    ) -> int:
        """Add an active snapshot or a view, and return its id.

        `planned` is what `chain_under` said. `settle` is called with the id when nothing but the
        disk can go wrong any more; the snapshot is there only if it returns.

        Raises NotFoundError, InvalidArgumentError, AlreadyExistsError, what `settle` raises.
        """
        with self._database.transaction() as run:
            parent_id = _parent_id(run, parent)
            if _chain(run, parent_id) != planned:  # removed, and another one has its name
                raise NotFoundError(f"parent {parent} was removed")
            created = self._insert(run, kind, key, parent_id, labels)
            settle(created)
            return created

    def create_lazy(
        self, names: Sequence[str], parent: str, labels: Mapping[str, str], place: LayerPlace
    ) -> bool:
        """Add a committed lazy snapshot under the first of `names` that is free.

        Returns False, and changes nothing, if a committed snapshot of this target (a label) and
        parent is there. Raises NotFoundError, InvalidArgumentError, AlreadyExistsError.
        """
        with self._database.transaction() as run:
            parent_id = _parent_id(run, parent)
            there = run.execute(
                "SELECT 1 FROM labels JOIN snapshots ON id = snapshot WHERE key = ? AND value = ?"
                " AND kind = 'committed' AND parent IS ?",
                (TARGET, labels[TARGET], parent_id),
            ).fetchone()
            if there:
                return False
            name = next((name for name in names if not _exists(run, name)), names[-1])
            created = self._insert(run, Kind.COMMITTED, name, parent_id, labels)
            run.execute(
                "INSERT INTO lazy (snapshot, image, depth, content_key, top)"
                " VALUES (?, ?, ?, ?, ?)",
                (created, place.image, place.depth, place.content_key, int(place.top)),
            )
            return True

    def commit(
        self, name: str, key: str, labels: Mapping[str, str], parent: str, usage: Usage
    ) -> None:
        """Turn an active snapshot into a committed one; its labels are replaced.

        Raises NotFoundError, AlreadyExistsError, FailedPreconditionError if it is not active,
        InvalidArgumentError if `parent` is neither empty nor its parent.
        """
        now = time.time_ns()
        with self._database.transaction() as run:
            record = _record(run, key)
            _check_name(run, name)
            if record.info.kind is not Kind.ACTIVE:
                raise FailedPreconditionError(f"snapshot {key} is not active")
            if parent not in ("", record.info.parent):
                raise InvalidArgumentError(
                    f"cannot change the parent of snapshot {key} when it is committed"
                )
            run.execute(
                "UPDATE snapshots SET name = ?, kind = 'committed', created_ns = ?, updated_ns = ?,"
                " inodes = ?, size = ? WHERE id = ?",
                (name, now, now, usage.inodes, usage.size, record.id),
            )
            _replace_labels(run, record.id, labels)

    def remove(self, key: str) -> Record:
        """Forget a snapshot, and return what it was.

        Raises NotFoundError, FailedPreconditionError if others are based on it.
        """
        with self._database.transaction() as run:
            record = _record(run, key)
            query = "SELECT name FROM snapshots WHERE parent = ? LIMIT 1"
            if child := run.execute(query, (record.id,)).fetchone():
                raise FailedPreconditionError(
                    f"cannot remove snapshot {key}: {child[0]} is based on it"
                )
            run.execute("DELETE FROM snapshots WHERE id = ?", (record.id,))
            return record

    def update(self, name: str, labels: Mapping[str, str], fieldpaths: Sequence[str]) -> Info:
        """Change labels: all, or those that `fieldpaths` name ("labels.<key>"); an empty value,
        or none, removes one.

        Raises NotFoundError, InvalidArgumentError for any other field.
        """
        with self._database.transaction() as run:
            record = _record(run, name)
            new = dict(record.info.labels)
            for path in fieldpaths or ("labels",):
                if path == "labels":
                    new = dict(labels)
                elif path.startswith("labels."):
                    key = path.removeprefix("labels.")
                    new[key] = labels.get(key, "")
                else:
                    raise InvalidArgumentError(f"cannot update {path!r} of snapshot {name}")
            _replace_labels(run, record.id, new)
            run.execute(
                "UPDATE snapshots SET updated_ns = ? WHERE id = ?", (time.time_ns(), record.id)
            )
            return _record(run, name).info

    def counts_for_content(self, record: Record) -> bool:
        """Whether this lazy snapshot is the one (the oldest) that accounts for its content."""
        if record.place is None:
            return False
        with self._database.reading() as run:
            lowest = run.execute(
                "SELECT min(snapshot) FROM lazy WHERE content_key = ?", (record.place.content_key,)
            ).fetchone()
        return bool(lowest[0] == record.id)

    def _insert(
        self,
        run: sqlite3.Connection,
        kind: Kind,
        name: str,
        parent: int | None,
        labels: Mapping[str, str],
    ) -> int:
        """Add a row in a transaction, under an id that no other snapshot had or will have.

        SQLite would give the id of a transaction that was undone to the next one, while the
        directory of that id is being deleted.
        """
        _check_name(run, name)
        query = "SELECT seq FROM sqlite_sequence WHERE name = 'snapshots'"
        (stored,) = run.execute(query).fetchone() or (0,)
        self._highest_id = max(self._highest_id, stored) + 1
        now = time.time_ns()
        run.execute(
            "INSERT INTO snapshots (id, name, parent, kind, created_ns, updated_ns)"
            " VALUES (?, ?, ?, ?, ?, ?)",
            (self._highest_id, name, parent, kind.value, now, now),
        )
        _replace_labels(run, self._highest_id, labels)
        return self._highest_id


def _exists(run: sqlite3.Connection, name: str) -> bool:
    return run.execute("SELECT 1 FROM snapshots WHERE name = ?", (name,)).fetchone() is not None


def _check_name(run: sqlite3.Connection, name: str) -> None:
    if not name:
        raise InvalidArgumentError("a snapshot needs a name")
    if _exists(run, name):
        raise AlreadyExistsError(f"snapshot {name} exists already")


def _parent_id(run: sqlite3.Connection, parent: str) -> int | None:
    if not parent:
        return None
    row = run.execute("SELECT id, kind FROM snapshots WHERE name = ?", (parent,)).fetchone()
    if row is None:
        raise NotFoundError(f"parent {parent} does not exist")
    if Kind(row[1]) is not Kind.COMMITTED:
        raise InvalidArgumentError(f"parent {parent} is not committed")
    return int(row[0])


def _chain(run: sqlite3.Connection, start: int | None) -> Chain:
    ordinary: list[int] = []
    for identity, image, depth in run.execute(_CHAIN, (start,)):
        if image is not None:
            return Chain(tuple(ordinary), image, depth)
        ordinary.append(identity)
    return Chain(tuple(ordinary))


def _replace_labels(run: sqlite3.Connection, snapshot: int, labels: Mapping[str, str]) -> None:
    """Store `labels` without the empty ones, as containerd's boltutil does."""
    run.execute("DELETE FROM labels WHERE snapshot = ?", (snapshot,))
    run.executemany(
        "INSERT INTO labels (snapshot, key, value) VALUES (?, ?, ?)",
        [(snapshot, key, value) for key, value in labels.items() if value],
    )


def _record(run: sqlite3.Connection, name: str) -> Record:
    row = run.execute(f"{_SELECT} WHERE s.name = ?", (name,)).fetchone()
    if row is None:
        raise NotFoundError(f"snapshot {name} does not exist")
    query = "SELECT key, value FROM labels WHERE snapshot = ?"
    return _to_record(row, dict(run.execute(query, (row[0],))))


def _to_record(row: tuple[Any, ...], labels: dict[str, str]) -> Record:
    identity, kind, name, parent, created, updated, inodes, size, image, depth, content, top = row
    info = Info(Kind(kind), name, parent, labels, created, updated)
    place = None if image is None else LayerPlace(image, depth, content, bool(top))
    return Record(identity, info, Usage(inodes, size), place)
