"""What containerd documents of a snapshotter's calls (core/snapshots), asked of five services:
FirstByte at its own socket, overlayfs in two containerds, and FirstByte as a proxy plugin in both.

The other modules `test_conformance_*` go on with labels, filters, files, many at once, and kills.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from snapshotter.containerd.snapshots import Kind
from tests.support.conformance import (
    ALREADY_EXISTS,
    CLEANUP,
    COMMIT_NOTHING_TO_A_TAKEN_NAME,
    CREATE_A_TAKEN_KEY_ON_NOTHING,
    CREATE_WITHOUT_NAME,
    FAILED_PRECONDITION,
    INVALID_ARGUMENT,
    KINDS,
    NO_NAME,
    NOT_FOUND,
    PARENTS,
    UNPACK_A_TARGET_THAT_IS_THERE,
    Session,
    write,
)

if TYPE_CHECKING:
    import grpc

    from snapshotter.containerd.snapshots import Info, Mount

pytestmark = pytest.mark.root


def state(session: Session) -> dict[str, Info]:
    return {info.name: info for info in session.calls.list()}


class TestPrepareAndView:
    def test_kinds_and_parents(self, session: Session) -> None:
        session.add_one_of_each()
        found = state(session)
        assert {name: info.kind for name, info in found.items()} == KINDS
        assert {name: info.parent for name, info in found.items()} == PARENTS
        for name, info in found.items():
            assert session.calls.stat(name) == info

    def test_without_a_parent_it_is_an_empty_directory(self, session: Session) -> None:
        with session.shown(session.calls.prepare("active")) as place:
            assert os.listdir(place) == []
            assert place.stat().st_mode & 0o7777 == 0o755
            (place / "file").write_text("content")
        with session.shown(session.calls.mounts("active")) as place:
            assert os.listdir(place) == ["file"]
        with session.shown(session.calls.view("view")) as place:
            assert os.listdir(place) == []

    def test_a_parent_must_be_there(self, session: Session) -> None:
        with session.refused(NOT_FOUND):
            session.calls.prepare("new", "missing")
        with session.refused(NOT_FOUND):
            session.calls.view("new", "missing")
        assert session.calls.list() == ()

    def test_a_parent_must_be_committed(self, session: Session) -> None:
        session.add_one_of_each()
        for parent in ("active", "view", "loose", "loose view"):
            with session.refused(INVALID_ARGUMENT):
                session.calls.prepare("new", parent)
            with session.refused(INVALID_ARGUMENT):
                session.calls.view("new", parent)
        assert session.calls.names() == set(KINDS)

    def test_keys_and_names_are_one_space(self, session: Session) -> None:
        session.add_one_of_each()
        before = state(session)
        for key in KINDS:
            with session.refused(ALREADY_EXISTS):
                session.calls.prepare(key, "high")
            with session.refused(ALREADY_EXISTS):
                session.calls.view(key)
            with session.refused(CREATE_A_TAKEN_KEY_ON_NOTHING):
                session.calls.prepare(key, "missing")
        assert state(session) == before

    def test_what_an_unpacker_says_the_name_will_be(self, session: Session) -> None:
        ref = "containerd.io/snapshot.ref"
        session.calls.prepare("extract", labels={ref: "low"})
        session.calls.commit("low", "extract", {ref: "low"})
        with session.refused(UNPACK_A_TARGET_THAT_IS_THERE):
            session.calls.prepare("extract", labels={ref: "low"})
        session.calls.prepare("extract high", "low", {ref: "high"})
        assert session.calls.stat("low").labels == {ref: "low"}
        assert session.calls.stat("extract high").labels == {ref: "high"}

    def test_a_key_is_needed(self, session: Session) -> None:
        with session.refused(CREATE_WITHOUT_NAME):
            session.calls.prepare("")
        with session.refused(CREATE_WITHOUT_NAME):
            session.calls.view("")
        assert session.calls.list() == ()

    def test_any_other_text_is_a_key(self, session: Session) -> None:
        texts = ["a b", "a/../b", "/", ".", "ü", "sha256:1,parent==x", '"', "l\nm", "%s", "k" * 900]
        for text in texts:
            session.calls.prepare(f"{text} key")
            session.calls.commit(text, f"{text} key", {"label": text})
            session.calls.prepare(f"on {text}", text)
            assert session.calls.stat(f"on {text}").parent == text
            assert session.calls.stat(text).labels == {"label": text}
        assert session.calls.names() == {*texts, *(f"on {text}" for text in texts)}

    @pytest.mark.parametrize(
        ("key", "parent", "code"),
        [
            ("high", "low", ALREADY_EXISTS),
            ("new", "missing", NOT_FOUND),
            ("new", "active", INVALID_ARGUMENT),
        ],
    )
    def test_what_is_refused_leaves_no_directory(
        self, session: Session, key: str, parent: str, code: grpc.StatusCode
    ) -> None:
        session.add_one_of_each()
        before = session.directories()
        with session.refused(code):
            session.calls.prepare(key, parent)
        with session.refused(code):
            session.calls.view(key, parent)
        assert session.directories() == before


class TestMounts:
    def test_a_layer_without_parent_is_bound(self, session: Session) -> None:
        (mount,) = session.calls.prepare("active")
        assert (mount.type, mount.options, mount.target) == ("bind", ("rw", "rbind"), "")
        (mount,) = session.calls.view("view")
        assert (mount.type, mount.options, mount.target) == ("bind", ("ro", "rbind"), "")

    def test_a_view_of_one_layer_is_bound(self, session: Session) -> None:
        session.add_layer("low")
        (mount,) = session.calls.view("view", "low")
        assert (mount.type, mount.options, mount.target) == ("bind", ("ro", "rbind"), "")

    @pytest.mark.parametrize("layers", [1, 2, 20])
    def test_more_layers_are_overlaid(self, session: Session, layers: int) -> None:
        below = ""
        for number in range(layers):
            session.add_layer(f"{number}", below)
            below = f"{number}"
        options = _overlay_options(session.calls.prepare("active", below))
        assert options.keys() == {"workdir", "upperdir", "lowerdir", "index"}
        lowers = options["lowerdir"].split(":")
        assert len(set(lowers)) == layers
        upper, work = options["upperdir"], options["workdir"]
        assert os.path.dirname(upper) == os.path.dirname(work)
        assert os.path.basename(upper) == "fs"
        assert os.path.basename(work) == "work"
        if layers > 1:
            options = _overlay_options(session.calls.view("view", below))
            assert options.keys() == {"lowerdir", "index"}
            assert options["lowerdir"].split(":") == lowers

    def test_they_can_be_asked_for_again(self, session: Session) -> None:
        session.add_layer("low")
        session.add_layer("high", "low")
        for number, parent in enumerate(["", "low", "high"]):
            made = session.calls.prepare(f"active {number}", parent)
            assert session.calls.mounts(f"active {number}") == made
            made = session.calls.view(f"view {number}", parent)
            assert session.calls.mounts(f"view {number}") == made

    def test_a_committed_snapshot_has_none(self, session: Session) -> None:
        session.add_layer("low")
        with session.refused(FAILED_PRECONDITION):
            session.calls.mounts("low")

    def test_of_what_is_not_there(self, session: Session) -> None:
        with session.refused(NOT_FOUND):
            session.calls.mounts("missing")
        with session.refused(NO_NAME):
            session.calls.mounts("")


def _overlay_options(mounts: tuple[Mount, ...]) -> dict[str, str]:
    (mount,) = mounts
    assert (mount.type, mount.source, mount.target) == ("overlay", "overlay", "")
    options = dict(option.split("=", 1) for option in mount.options)
    assert len(options) == len(mount.options)
    return options


class TestCommit:
    def test_it_ends_the_key_and_keeps_the_parent(self, session: Session) -> None:
        session.add_layer("low")
        session.calls.prepare("active", "low")
        session.calls.commit("high", "active")
        info = session.calls.stat("high")
        assert (info.kind, info.parent) == (Kind.COMMITTED, "low")
        with session.refused(NOT_FOUND):
            session.calls.stat("active")
        session.calls.prepare("active", "high")

    def test_the_key_must_be_there(self, session: Session) -> None:
        session.add_layer("low")
        with session.refused(NOT_FOUND):
            session.calls.commit("new", "missing")
        with session.refused(COMMIT_NOTHING_TO_A_TAKEN_NAME):
            session.calls.commit("low", "missing")
        assert session.calls.names() == {"low"}

    def test_the_key_must_be_active(self, session: Session) -> None:
        session.add_one_of_each()
        before = state(session)
        for key in ("low", "high", "view", "loose view"):
            with session.refused(FAILED_PRECONDITION):
                session.calls.commit("new", key)
        assert state(session) == before

    def test_the_name_must_be_free(self, session: Session) -> None:
        session.add_one_of_each()
        before = state(session)
        for name in KINDS:
            with session.refused(ALREADY_EXISTS):
                session.calls.commit(name, "active")
        assert state(session) == before

    def test_names_are_needed(self, session: Session) -> None:
        session.calls.prepare("active")
        with session.refused(CREATE_WITHOUT_NAME):
            session.calls.commit("", "active")
        with session.refused(NO_NAME):
            session.calls.commit("new", "")
        assert session.calls.names() == {"active"}

    def test_while_it_is_mounted(self, session: Session) -> None:
        session.add_layer("low")
        with session.shown(session.calls.prepare("active", "low")) as place:
            (place / "file").write_text("content")
            session.calls.commit("high", "active")
        with session.viewed("high") as place:
            assert (place / "file").read_text() == "content"


class TestRemove:
    @pytest.mark.parametrize("key", ["active", "view", "loose", "loose view"])
    def test_it_is_gone(self, session: Session, key: str) -> None:
        session.add_one_of_each()
        session.calls.remove(key)
        assert session.calls.names() == KINDS.keys() - {key}
        with session.refused(NOT_FOUND):
            session.calls.stat(key)
        with session.refused(NOT_FOUND):
            session.calls.remove(key)

    def test_what_others_are_based_on_stays(self, session: Session) -> None:
        session.add_one_of_each()
        for key in ("low", "high"):
            with session.refused(FAILED_PRECONDITION):
                session.calls.remove(key)
        session.calls.remove("active")
        with session.refused(FAILED_PRECONDITION):
            session.calls.remove("high")
        session.calls.remove("view")
        session.calls.remove("high")
        session.calls.remove("low")
        assert session.calls.names() == {"loose", "loose view"}

    def test_of_what_is_not_there(self, session: Session) -> None:
        with session.refused(NOT_FOUND):
            session.calls.remove("missing")
        with session.refused(NO_NAME):
            session.calls.remove("")

    def test_names_can_be_used_again(self, session: Session) -> None:
        session.add_layer("low", change=write("file", "first"))
        session.calls.prepare("key", "low")
        session.calls.remove("key")
        session.calls.view("key", "low")
        session.calls.remove("key")
        session.calls.prepare("key")
        session.calls.remove("low")
        session.calls.commit("low", "key")
        with session.viewed("low") as place:
            assert os.listdir(place) == []

    def test_while_it_is_mounted(self, session: Session) -> None:
        session.add_layer("low")
        before = session.directories()
        with session.shown(session.calls.prepare("active", "low")) as place:
            (place / "file").write_text("content")
            session.calls.remove("active")
            assert (place / "file").read_text() == "content"
        session.collect()
        assert session.directories() == before


class TestCleanup:
    def test_directories_of_removed_snapshots_go_and_others_stay(self, session: Session) -> None:
        session.add_one_of_each()
        kept = session.directories()
        assert len(kept) == len(KINDS)
        for number in range(3):
            with session.shown(session.calls.prepare(f"{number}", "high")) as place:
                (place / "deep").mkdir()
                (place / "deep" / "file").write_text("content")
            session.calls.remove(f"{number}")
        session.collect()
        assert session.directories() == kept
        for key in ("active", "view", "loose", "loose view"):
            with session.shown(session.calls.mounts(key)):
                pass

    def test_directories_that_belong_to_nothing_go(self, session: Session) -> None:
        session.add_layer("low")
        kept = session.directories()
        (session.snapshots / "new-1" / "fs").mkdir(parents=True)
        (session.snapshots / "new-1" / "fs" / "file").write_text("content")
        (session.snapshots / "987654").mkdir()
        session.collect()
        assert session.directories() == kept

    def test_whom_it_is_for(self, session: Session) -> None:
        with session.refused(CLEANUP):
            session.calls.cleanup()
        with session.refused(CLEANUP):
            session.calls.cleanup()
