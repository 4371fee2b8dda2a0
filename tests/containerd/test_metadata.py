"""What is known about snapshots: rules as in containerd's bolt storage, and on disk at once."""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from snapshotter.containerd.database import VERSION, Database
from snapshotter.containerd.errors import (
    AlreadyExistsError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    SnapshotError,
)
from snapshotter.containerd.fallbacks import Fallbacks
from snapshotter.containerd.labels import TARGET
from snapshotter.containerd.lazy import LayerPlace, Refused
from snapshotter.containerd.metadata import Chain, Counts, Metadata
from snapshotter.containerd.snapshots import Kind, Usage
from snapshotter.mounts import syscalls
from snapshotter.mounts.syscalls import MountFlag
from snapshotter.store.errors import StoreError, StoreFullError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from contextlib import AbstractContextManager

ZERO = Usage(0, 0)


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    database = Database(tmp_path / "metadata.db")
    yield database
    database.close()


@pytest.fixture
def metadata(database: Database) -> Metadata:
    return Metadata(database)


def create(
    metadata: Metadata,
    key: str,
    parent: str = "",
    labels: Mapping[str, str] | None = None,
    kind: Kind = Kind.ACTIVE,
) -> int:
    planned = metadata.chain_under(parent)
    return metadata.create(
        kind, key, parent, labels or {}, planned=planned, settle=lambda snapshot: None
    )


def committed(metadata: Metadata, name: str, parent: str = "") -> int:
    created = create(metadata, f"{name} in the making", parent)
    metadata.commit(name, f"{name} in the making", {}, "", ZERO)
    return created


def lazy(
    metadata: Metadata, target: str, parent: str, image: str, depth: int, content: str = "00"
) -> bool:
    place = LayerPlace(image, depth, content, top=False)
    return metadata.create_lazy((target, f"{target} more"), parent, {TARGET: target}, place)


def test_an_active_snapshot_is_what_it_was_made_as(metadata: Metadata) -> None:
    committed(metadata, "base")
    before = time.time_ns()
    create(metadata, "key", "base", {"a": "1", "empty": ""})
    info = metadata.record("key").info
    assert (info.kind, info.name, info.parent) == (Kind.ACTIVE, "key", "base")
    assert info.labels == {"a": "1"}  # containerd stores no empty labels
    assert before <= info.created_ns == info.updated_ns <= time.time_ns()


def test_parents_must_be_there_and_be_committed(metadata: Metadata) -> None:
    create(metadata, "active")
    create(metadata, "view", kind=Kind.VIEW)
    with pytest.raises(NotFoundError, match="parent nothing"):
        create(metadata, "key", "nothing")
    for parent in ("active", "view"):
        with pytest.raises(InvalidArgumentError, match="not committed"):
            create(metadata, "key", parent)


def test_names_and_keys_are_one_space(metadata: Metadata) -> None:
    committed(metadata, "base")
    create(metadata, "active")
    for name in ("base", "active"):
        with pytest.raises(AlreadyExistsError):
            create(metadata, name)
    with pytest.raises(AlreadyExistsError):
        metadata.commit("base", "active", {}, "", ZERO)
    with pytest.raises(AlreadyExistsError):
        metadata.commit("active", "active", {}, "", ZERO)


def test_a_snapshot_needs_a_name(metadata: Metadata) -> None:
    with pytest.raises(InvalidArgumentError):
        create(metadata, "")
    create(metadata, "key")
    with pytest.raises(InvalidArgumentError):
        metadata.commit("", "key", {}, "", ZERO)


def test_a_snapshot_whose_directory_fails_is_not_there_and_its_id_never_comes_back(
    metadata: Metadata,
) -> None:
    ids = []

    def fail(snapshot: int) -> None:
        ids.append(snapshot)
        raise OSError("the disk is on fire")

    with pytest.raises(OSError, match="fire"):
        metadata.create(Kind.ACTIVE, "key", "", {}, planned=Chain(), settle=fail)
    with pytest.raises(NotFoundError):
        metadata.record("key")
    assert create(metadata, "key") > ids[0]


def test_ids_do_not_come_back_after_a_removal(database: Database, metadata: Metadata) -> None:
    first = create(metadata, "key")
    metadata.remove("key")
    assert create(Metadata(database), "key") > first


def test_a_parent_that_is_another_one_by_now_is_refused(metadata: Metadata) -> None:
    committed(metadata, "base")
    planned = metadata.chain_under("base")
    metadata.remove("base")
    committed(metadata, "base")
    with pytest.raises(NotFoundError, match="was removed"):
        metadata.create(Kind.ACTIVE, "key", "base", {}, planned=planned, settle=lambda _: None)


def test_commit_renames_replaces_labels_and_starts_the_times_anew(metadata: Metadata) -> None:
    committed(metadata, "base")
    created = create(metadata, "key", "base", {"a": "1"})
    before = time.time_ns()
    metadata.commit("name", "key", {"b": "2"}, "base", Usage(3, 4096))
    record = metadata.record("name")
    assert (record.id, record.usage) == (created, Usage(3, 4096))
    assert (record.info.kind, record.info.parent) == (Kind.COMMITTED, "base")
    assert record.info.labels == {"b": "2"}
    assert before <= record.info.created_ns == record.info.updated_ns
    with pytest.raises(NotFoundError):
        metadata.record("key")


def test_only_active_snapshots_can_be_committed(metadata: Metadata) -> None:
    committed(metadata, "base")
    create(metadata, "view", kind=Kind.VIEW)
    for key in ("base", "view"):
        with pytest.raises(FailedPreconditionError, match="not active"):
            metadata.commit("name", key, {}, "", ZERO)
    with pytest.raises(NotFoundError):
        metadata.commit("name", "nothing", {}, "", ZERO)


def test_commit_cannot_change_the_parent(metadata: Metadata) -> None:
    committed(metadata, "base")
    create(metadata, "key", "base")
    with pytest.raises(InvalidArgumentError, match="parent"):
        metadata.commit("name", "key", {}, "other", ZERO)
    assert metadata.record("key").info.kind is Kind.ACTIVE


def test_remove_refuses_what_others_are_based_on(metadata: Metadata) -> None:
    committed(metadata, "base")
    create(metadata, "key", "base")
    with pytest.raises(FailedPreconditionError, match="cannot remove snapshot base: key is based"):
        metadata.remove("base")
    metadata.remove("key")
    metadata.remove("base")
    with pytest.raises(NotFoundError):
        metadata.remove("base")


def test_update_changes_the_labels_that_it_names(metadata: Metadata) -> None:
    create(metadata, "key", labels={"a": "1", "b": "2", "c.d/e": "3"})
    before = metadata.record("key").info
    updated = metadata.update("key", {"a": "9", "x": "9", "c.d/e": "4"}, ["labels.a", "labels.b"])
    assert updated.labels == {"a": "9", "c.d/e": "3"}
    assert updated.created_ns == before.created_ns < updated.updated_ns
    assert metadata.update("key", {"c.d/e": "4"}, ["labels.c.d/e"]).labels == {
        "a": "9",
        "c.d/e": "4",
    }
    assert metadata.update("key", {"y": "1", "z": ""}, ["labels"]).labels == {"y": "1"}
    assert metadata.update("key", {"all": "new"}, []).labels == {"all": "new"}
    assert metadata.record("key").info.labels == {"all": "new"}


@pytest.mark.parametrize("path", ["parent", "name", "kind", "created", "label", ""])
def test_update_refuses_all_other_fields(metadata: Metadata, path: str) -> None:
    create(metadata, "key", labels={"a": "1"})
    with pytest.raises(InvalidArgumentError, match="cannot update"):
        metadata.update("key", {"a": "2"}, ["labels.a", path])
    assert metadata.record("key").info.labels == {"a": "1"}
    with pytest.raises(NotFoundError):
        metadata.update("nothing", {}, [path])


def test_a_chain_of_200_is_read_from_the_nearest_to_the_root(metadata: Metadata) -> None:
    ids = [committed(metadata, f"{i}", f"{i - 1}" if i else "") for i in range(200)]
    create(metadata, "key", "199")
    record, chain = metadata.chain_of("key")
    assert record.info.name == "key"
    assert chain == Chain(ordinary=tuple(reversed(ids)))


def test_a_chain_ends_with_the_nearest_lazy_snapshot(metadata: Metadata) -> None:
    committed(metadata, "root")
    assert lazy(metadata, "l1", "root", "image", 1)
    assert lazy(metadata, "l2", "l1", "image", 2)
    first = committed(metadata, "o1", "l2")
    second = committed(metadata, "o2", "o1")
    assert metadata.chain_under("o2") == Chain((second, first), "image", 2)
    assert metadata.chain_under("l1") == Chain((), "image", 1)


def test_a_committed_snapshot_has_no_mounts(metadata: Metadata) -> None:
    committed(metadata, "base")
    with pytest.raises(FailedPreconditionError):
        metadata.chain_of("base")


def test_a_lazy_target_is_made_once_for_each_parent(metadata: Metadata) -> None:
    committed(metadata, "other")
    assert lazy(metadata, "l1", "", "image", 1)
    assert not lazy(metadata, "l1", "", "another image", 1)
    assert lazy(metadata, "l1", "other", "image", 1)
    assert not lazy(metadata, "l1", "other", "image", 1)
    found = {(record.info.name, record.info.parent) for record in metadata.all() if record.place}
    assert found == {("l1", ""), ("l1 more", "other")}


def test_snapshots_can_be_found_by_a_label(metadata: Metadata) -> None:
    committed(metadata, "other")
    lazy(metadata, "l1", "", "image", 1)
    lazy(metadata, "l2", "l1", "image", 2)
    every = {record.info.name: record for record in metadata.all()}
    assert metadata.all((TARGET, "l2")) == [every["l2"]]
    assert metadata.all((TARGET, "l3")) == metadata.all(("other", "l2")) == []


def test_an_unpacked_target_with_the_same_parent_will_do(metadata: Metadata) -> None:
    create(metadata, "key")
    metadata.commit("any name", "key", {TARGET: "l1"}, "", ZERO)
    assert not lazy(metadata, "l1", "", "image", 1)


def test_removing_a_lazy_snapshot_says_which_layer_it_was(metadata: Metadata) -> None:
    lazy(metadata, "l1", "", "image", 1)
    lazy(metadata, "l2", "l1", "image", 2)
    assert metadata.remove("l2").place == LayerPlace("image", 2, "00", top=False)


def test_shared_content_is_counted_for_one_snapshot(metadata: Metadata) -> None:
    lazy(metadata, "a", "", "image", 1, content="c1")
    lazy(metadata, "b", "", "other", 1, content="c1")
    assert [metadata.counts_for_content(metadata.record(name)) for name in "ab"] == [True, False]
    metadata.remove("a")
    assert metadata.counts_for_content(metadata.record("b"))


def test_counts_by_purpose(metadata: Metadata) -> None:
    committed(metadata, "base")
    lazy(metadata, "l1", "", "image", 1)
    create(metadata, "container", "base")
    create(metadata, "extract", "base", {TARGET: "chain"})
    create(metadata, "view", "base", kind=Kind.VIEW)
    assert metadata.counts() == Counts(lazy_layers=1, ordinary_layers=1, containers=1, views=1)


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


def test_one_of_many_threads_gets_the_name(metadata: Metadata) -> None:
    results = []

    def attempt(number: int) -> None:
        try:
            results.append(create(metadata, "key", labels={"n": str(number)}))
        except AlreadyExistsError:
            results.append(0)

    threads = [threading.Thread(target=attempt, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 8
    assert [result for result in results if result] == [metadata.record("key").id]


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


def test_refusals_are_counted_by_image_and_reason(database: Database) -> None:
    fallbacks = Fallbacks(database)
    refused = Refused("r/image:1", "sha256:1", "no index", "no-index")
    assert fallbacks.add(refused)
    assert not fallbacks.add(refused)
    assert fallbacks.add(Refused("r/image:1", "sha256:1", "not allowed", "policy"))
    assert not fallbacks.add(Refused("r/image:1", "sha256:2", "no index", "no-index"))
    latest = Fallbacks(database).latest()
    assert [(f.image, f.kind, f.layers) for f in latest] == [
        ("sha256:2", "no-index", 3),
        ("sha256:1", "policy", 1),
    ]


def test_the_latest_200_refusals_are_kept(database: Database) -> None:
    fallbacks = Fallbacks(database)
    for n in range(205):
        fallbacks.add(Refused(f"r/image:{n}", "", "no index", "no-index"))
    latest = fallbacks.latest()
    assert [f.reference for f in latest] == [f"r/image:{n}" for n in range(204, 4, -1)]


NAMES = st.sampled_from([f"n{i}" for i in range(6)])
PARENTS = st.one_of(st.just(""), NAMES)
LABELS = st.dictionaries(st.sampled_from(["a", "b", TARGET]), st.sampled_from(["", "1", "2"]))


class Model(RuleBasedStateMachine):
    """Metadata against a dictionary that follows the same rules in the plainest way."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="firstbyte-test-"))
        self.open()
        # name: kind, parent, labels, usage, lazy (image, depth)
        self.model: dict[str, tuple[Kind, str, dict[str, str], Usage, tuple[str, int] | None]] = {}

    def open(self) -> None:
        self.database = Database(self.folder / "metadata.db")
        self.metadata = Metadata(self.database)

    def teardown(self) -> None:
        self.database.close()
        shutil.rmtree(self.folder)

    def parent_error(self, parent: str) -> type[SnapshotError] | None:
        if parent and parent not in self.model:
            return NotFoundError
        if parent and self.model[parent][0] is not Kind.COMMITTED:
            return InvalidArgumentError
        return None

    @rule(kind=st.sampled_from([Kind.ACTIVE, Kind.VIEW]), key=NAMES, parent=PARENTS, labels=LABELS)
    def create(self, kind: Kind, key: str, parent: str, labels: dict[str, str]) -> None:
        expected = self.parent_error(parent) or (AlreadyExistsError if key in self.model else None)
        with expecting(expected):
            create(self.metadata, key, parent, labels, kind)
            self.model[key] = (kind, parent, stored(labels), ZERO, None)

    @rule(name=NAMES, key=NAMES, parent=PARENTS, labels=LABELS, size=st.integers(0, 2**40))
    def commit(self, name: str, key: str, parent: str, labels: dict[str, str], size: int) -> None:
        expected: type[SnapshotError] | None = None
        if key not in self.model:
            expected = NotFoundError
        elif name in self.model:
            expected = AlreadyExistsError
        elif self.model[key][0] is not Kind.ACTIVE:
            expected = FailedPreconditionError
        elif parent not in ("", self.model[key][1]):
            expected = InvalidArgumentError
        usage = Usage(size // 4096, size)
        with expecting(expected):
            self.metadata.commit(name, key, labels, parent, usage)
            was = self.model.pop(key)
            self.model[name] = (Kind.COMMITTED, was[1], stored(labels), usage, None)

    @rule(
        chain=NAMES,
        parent=PARENTS,
        image=st.sampled_from(["i", "j"]),
        depth=st.integers(1, 3),
        labels=LABELS,
    )
    def add_lazy(
        self, chain: str, parent: str, image: str, depth: int, labels: dict[str, str]
    ) -> None:
        labels = {**labels, TARGET: chain}
        there = any(
            kind is Kind.COMMITTED and (its_parent, its_labels.get(TARGET)) == (parent, chain)
            for kind, its_parent, its_labels, _, _ in self.model.values()
        )
        names = (chain, f"{chain} more")
        free = [name for name in names if name not in self.model]
        expected = self.parent_error(parent)
        if expected is None and not there and not free:
            expected = AlreadyExistsError
        with expecting(expected):
            place = LayerPlace(image, depth, "00", top=False)
            assert self.metadata.create_lazy(names, parent, labels, place) is not there
            if not there:
                entry = (Kind.COMMITTED, parent, stored(labels), ZERO, (image, depth))
                self.model[free[0]] = entry

    @rule(key=NAMES, more=st.booleans())
    def remove(self, key: str, more: bool) -> None:
        key = f"{key} more" if more else key
        expected: type[SnapshotError] | None = None
        if key not in self.model:
            expected = NotFoundError
        elif any(parent == key for _, parent, _, _, _ in self.model.values()):
            expected = FailedPreconditionError
        with expecting(expected):
            removed = self.metadata.remove(key)
            was = self.model.pop(key)[4]
            place = removed.place
            assert (place and (place.image, place.depth)) == was

    @rule(
        name=NAMES,
        labels=LABELS,
        paths=st.lists(st.sampled_from(["labels", "labels.a", "labels.b", "parent"]), max_size=2),
    )
    def update(self, name: str, labels: dict[str, str], paths: list[str]) -> None:
        expected: type[SnapshotError] | None = None
        if name not in self.model:
            expected = NotFoundError
        elif "parent" in paths:
            expected = InvalidArgumentError
        with expecting(expected):
            info = self.metadata.update(name, labels, paths)
            kind, parent, new, usage, lazy = self.model[name]
            for path in paths or ["labels"]:
                key = path.removeprefix("labels.")
                new = labels if path == "labels" else {**new, key: labels.get(key, "")}
            self.model[name] = (kind, parent, stored(new), usage, lazy)
            assert info.labels == stored(new)

    @rule()
    def reopen(self) -> None:
        self.database.close()
        self.open()

    @invariant()
    def they_agree(self) -> None:
        found = {
            record.info.name: (
                record.info.kind,
                record.info.parent,
                record.info.labels,
                record.usage,
                (record.place.image, record.place.depth) if record.place else None,
            )
            for record in self.metadata.all()
        }
        assert found == self.model

    @invariant()
    def chains_agree(self) -> None:
        ids = {record.info.name: record.id for record in self.metadata.all()}
        for name, (kind, parent, *_) in self.model.items():
            if kind is not Kind.COMMITTED:
                ordinary = []
                while parent and not self.model[parent][4]:
                    ordinary.append(ids[parent])
                    parent = self.model[parent][1]
                end = (self.model[parent][4] if parent else None) or ("", 0)
                assert self.metadata.chain_of(name)[1] == Chain(tuple(ordinary), *end)


def stored(labels: dict[str, str]) -> dict[str, str]:
    return {key: value for key, value in labels.items() if value}


def expecting(error: type[SnapshotError] | None) -> AbstractContextManager[object]:
    return pytest.raises(error) if error else contextlib.nullcontext()


Model.TestCase.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
TestModel = Model.TestCase
