"""What is known about snapshots: rules as in containerd's bolt storage, and on disk at once."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

import pytest

from snapshotter.containerd.database import Database
from snapshotter.containerd.errors import (
    AlreadyExistsError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
)
from snapshotter.containerd.fallbacks import Fallbacks
from snapshotter.containerd.labels import TARGET
from snapshotter.containerd.lazy import LayerPlace, Refused
from snapshotter.containerd.metadata import Chain, Counts, Metadata
from snapshotter.containerd.snapshots import Kind, Usage
from tests.support.snapshot_metadata import committed, create, lazy

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

ZERO = Usage(0, 0)


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    database = Database(tmp_path / "metadata.db")
    yield database
    database.close()


@pytest.fixture
def metadata(database: Database) -> Metadata:
    return Metadata(database)


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
