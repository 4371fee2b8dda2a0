"""Labels, times and filters, asked of the services of `test_conformance.py`."""

from __future__ import annotations

import time

import pytest

from snapshotter.containerd.snapshots import Info, Kind
from tests.support.conformance import (
    INVALID_ARGUMENT,
    NO_EXPRESSION,
    NO_FILTER,
    NO_NAME,
    NOT_FOUND,
    Session,
)

pytestmark = pytest.mark.root

# containerd tells a snapshotter labels of this kind only, and keeps others itself.
TOLD = "containerd.io/snapshot/told"


class TestStat:
    def test_of_what_is_not_there(self, session: Session) -> None:
        with session.refused(NOT_FOUND):
            session.calls.stat("missing")
        with session.refused(NO_NAME):
            session.calls.stat("")

    def test_it_says_what_list_says(self, session: Session) -> None:
        session.add_one_of_each()
        session.calls.update("active", {"a": "1", TOLD: "2"})
        for info in session.calls.list():
            assert session.calls.stat(info.name) == info


class TestLabels:
    def test_they_are_kept_as_given(self, session: Session) -> None:
        labels = {"a": "1", "a.b/c-d": "ü, ==", TOLD: "x" * 3000}
        session.calls.prepare("active", labels=labels)
        session.calls.view("view", labels=labels)
        assert session.calls.stat("active").labels == labels
        assert session.calls.stat("view").labels == labels

    def test_empty_ones_are_none(self, session: Session) -> None:
        session.calls.prepare("active", labels={"a": "1", "b": "", TOLD: ""})
        assert session.calls.stat("active").labels == {"a": "1"}

    def test_commit_replaces_them(self, session: Session) -> None:
        session.calls.prepare("active", labels={"a": "1", "b": "2", TOLD: "3"})
        session.calls.commit("low", "active", {"b": "4"})
        assert session.calls.stat("low").labels == {"b": "4"}

        session.calls.prepare("active", labels={"a": "1", TOLD: "3"})
        session.calls.commit("bare", "active")
        assert session.calls.stat("bare").labels == {}

    def test_they_are_not_inherited_from_parents(self, session: Session) -> None:
        session.calls.prepare("active")
        session.calls.commit("low", "active", {"a": "1", TOLD: "2"})
        session.calls.prepare("active", "low")
        session.calls.view("view", "low")
        assert session.calls.stat("active").labels == {}
        assert session.calls.stat("view").labels == {}


# What Update is told of a snapshot with LABELS, and the labels that it has then.
LABELS = {"a": "1", "b": "2", TOLD: "3"}
UPDATES: tuple[tuple[dict[str, str], tuple[str, ...], dict[str, str]], ...] = (
    ({"c": "4"}, (), {"c": "4"}),
    ({"c": "4"}, ("labels",), {"c": "4"}),
    ({}, (), {}),
    ({}, ("labels",), {}),
    ({"a": "5", "c": "4"}, ("labels.a",), {"a": "5", "b": "2", TOLD: "3"}),
    ({"a": "5"}, ("labels.a", "labels.b"), {"a": "5", TOLD: "3"}),
    ({"a": ""}, ("labels.a",), {"b": "2", TOLD: "3"}),
    ({"a": "", "b": "6"}, (), {"b": "6"}),
    ({TOLD: "7"}, (f"labels.{TOLD}",), {"a": "1", "b": "2", TOLD: "7"}),
    ({TOLD: ""}, (f"labels.{TOLD}",), {"a": "1", "b": "2"}),
    ({"c": "4"}, ("labels.missing",), {"a": "1", "b": "2", TOLD: "3"}),
    ({"c": "4", "d": "8"}, ("labels", "labels.d"), {"c": "4", "d": "8"}),
)


@pytest.mark.parametrize("name", ["high", "active", "view"])
class TestUpdateOfEachKind:
    @pytest.fixture(autouse=True)
    def one_of_each(self, session: Session) -> None:
        session.add_one_of_each()

    def test_labels(self, session: Session, name: str) -> None:
        for labels, paths, expected in UPDATES:
            session.calls.update(name, LABELS)
            answer = session.calls.update(name, labels, paths)
            assert answer.labels == expected, (labels, paths)
            assert session.calls.stat(name) == answer

    def test_all_else_is_refused(self, session: Session, name: str) -> None:
        before = session.calls.stat(name)
        for path in ("parent", "kind", "name", "created_at", "label", "labelsa"):
            with session.refused(INVALID_ARGUMENT):
                session.calls.update(name, {"a": "9"}, ["labels.a", path])
        assert session.calls.stat(name) == before

    def test_other_fields_are_not_looked_at(self, session: Session, name: str) -> None:
        before = session.calls.stat(name)
        session.calls.update_fields(
            {"name": name, "parent": "elsewhere", "kind": 2, "labels": {"a": "9"}}
        )
        after = session.calls.stat(name)
        assert after.labels == {"a": "9"}
        assert (after.name, after.parent, after.kind) == (before.name, before.parent, before.kind)
        assert after.created_ns == before.created_ns
        assert after.updated_ns > before.updated_ns


def test_update_of_what_is_not_there(session: Session) -> None:
    with session.refused(NOT_FOUND):
        session.calls.update("missing", {"a": "1"})
    with session.refused(NOT_FOUND):
        session.calls.update("missing", {"a": "1"}, ["labels.a"])
    with session.refused(INVALID_ARGUMENT):
        session.calls.update("", {"a": "1"})


class TestTimes:
    def test_of_making(self, session: Session) -> None:
        before = time.time_ns()
        session.add_one_of_each()
        after = time.time_ns()
        for info in session.calls.list():
            assert before <= info.created_ns <= after
            assert info.updated_ns == info.created_ns

    def test_of_changing(self, session: Session) -> None:
        session.calls.prepare("active")
        made = session.calls.stat("active")
        before = time.time_ns()
        changed = session.calls.update("active", {"a": "1"})
        after = time.time_ns()
        assert changed.created_ns == made.created_ns
        assert before <= changed.updated_ns <= after

    def test_commit_begins_anew(self, session: Session) -> None:
        session.calls.prepare("active")
        session.calls.update("active", {"a": "1"})
        before = time.time_ns()
        session.calls.commit("low", "active")
        after = time.time_ns()
        low = session.calls.stat("low")
        assert before <= low.created_ns <= after
        assert low.updated_ns == low.created_ns

    def test_others_change_nothing(self, session: Session) -> None:
        low = session.add_layer("low")
        session.calls.prepare("active", "low")
        made = session.calls.stat("active")
        session.calls.mounts("active")
        session.calls.usage("active")
        session.calls.view("view", "low")
        session.calls.remove("view")
        assert session.calls.stat("active") == made
        assert session.calls.stat("low") == low


# Filters of List, and what they find among the snapshots of `test_filters`.
ALL = "low high active view loose loose-view"
FILTERS = {
    (): ALL,
    ("",): ALL,
    ("kind==active",): "active loose",
    ("kind==view",): "view loose-view",
    ("kind==committed",): "low high",
    ("kind==Committed",): "",
    ("kind!=committed",): "active view loose loose-view",
    ("kind",): ALL,
    ("name==high",): "high",
    ("name==missing",): "",
    ("name==low", "name==loose"): "low loose",
    ('name=="low"',): "low",
    ("name~=^lo",): "low loose loose-view",
    ("name~=o",): "low loose loose-view",
    ("name~=/^(low|view)$/",): "low view",
    ("name~=|^l[a-m]|",): "",
    ("parent==high",): "active view",
    ('parent==""',): "low loose loose-view",
    ('parent!=""',): "high active view",
    ("labels.a",): "low active loose",
    ("labels.a==1",): "low active",
    ("labels.a!=1",): "high view loose loose-view",
    ("labels.a~=^[12]$",): "low active loose",
    ('labels."with.dots/and-more"==x',): "loose",
    ('labels."with.dots/and-more"',): "loose view",
    ("labels.with.dots",): "",
    (f'labels."{TOLD}"==y',): "high",
    (f'labels."{TOLD}"==y', "kind==view"): "high view loose-view",
    ("kind==active,labels.a==1",): "active",
    ("kind==active,labels.a==1", "parent==low"): "active high",
    ("kind==active,kind==view",): "",
    ("labels.a==1", ""): ALL,
    ("labels.a== 1",): "low active",
    ("unknown==1",): "",
    ("unknown!=1",): ALL,
    ('labels.a==""',): "",
    ('labels.a!=""',): "low active loose",
    ('unknown==""',): "",
    ("unknown",): "",
    ("labels",): "",
}
NO_FILTERS = (
    "==",
    "kind=active",
    "kind==",
    "kind active",
    "name==a,",
    ",",
    'name=="a',
    "name~~a",
    ".",
    "name==.*",
)


class TestList:
    def test_nothing(self, session: Session) -> None:
        assert session.calls.list() == ()
        assert session.calls.list(["kind==active"]) == ()

    def test_filters(self, session: Session) -> None:
        session.add_layer("low")
        session.add_layer("high", "low")
        session.calls.prepare("active", "high")
        session.calls.view("view", "high")
        session.calls.prepare("loose")
        session.calls.view("loose-view")
        session.calls.update("low", {"a": "1"})
        session.calls.update("high", {TOLD: "y"})
        session.calls.update("active", {"a": "1"})
        session.calls.update("loose", {"a": "2", "with.dots/and-more": "x"})
        session.calls.update("view", {"with.dots/and-more": "z"})

        found = {filters: session.calls.names(*filters) for filters in FILTERS}
        assert found == {filters: set(expected.split()) for filters, expected in FILTERS.items()}

    def test_what_is_no_filter(self, session: Session) -> None:
        for wrong in NO_FILTERS:
            with session.refused(NO_FILTER):
                session.calls.list([wrong])
            with session.refused(NO_FILTER):
                session.calls.list(["kind==active", wrong])

    def test_what_is_no_regular_expression(self, session: Session) -> None:
        session.add_layer("low")
        with session.refused(NO_EXPRESSION):
            session.calls.list(["name~=/(/"])

    def test_each_is_said_once(self, session: Session) -> None:
        session.add_one_of_each()
        found: tuple[Info, ...] = session.calls.list(["kind==active", "name==active", "parent"])
        assert len(found) == len({info.name for info in found})
        assert {info.kind for info in found} == set(Kind)
