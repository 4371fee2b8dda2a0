"""Whatever is done to it, the metadata store follows the rules of a plain dictionary."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from snapshotter.containerd.database import Database
from snapshotter.containerd.errors import (
    AlreadyExistsError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    SnapshotError,
)
from snapshotter.containerd.labels import TARGET
from snapshotter.containerd.lazy import LayerPlace
from snapshotter.containerd.metadata import Chain, Metadata
from snapshotter.containerd.snapshots import Kind, Usage
from tests.support.snapshot_metadata import create

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

ZERO = Usage(0, 0)

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


Model.TestCase.settings = settings(max_examples=40, stateful_step_count=30)
TestModel = Model.TestCase
