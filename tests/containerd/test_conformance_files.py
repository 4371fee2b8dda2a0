"""What layers show when they are mounted, and what they take on the disk, asked of the services of
`test_conformance.py`.

Changes are also made in an ordinary directory, which says what must be seen.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from snapshotter.containerd.snapshots import Usage
from tests.support.conformance import NO_NAME, NOT_FOUND, SERVICES, Service, Session, write
from tests.support.trees import differences, read_tree

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.support.trees import Item

pytestmark = pytest.mark.root


def check_layers(session: Session, flat: Path, *changes: Callable[[Path], object]) -> None:
    """Every layer shows what was changed up to it, in it and in all that is based on it."""
    flat.mkdir(mode=0o755)
    parent = ""
    for number, change in enumerate(changes):
        name = f"layer {number}"
        before = _tree(flat)
        change(flat)
        mounts = session.calls.prepare(f"extract {number}", parent)
        with session.shown(mounts) as place:
            assert differences(_tree(place), before) == []
            change(place)
            assert differences(_tree(place), _tree(flat)) == []
        session.calls.commit(name, f"extract {number}")
        with session.viewed(name) as place:
            assert differences(_tree(place), _tree(flat)) == []
        parent = name
    with session.shown(session.calls.prepare("container", parent)) as place:
        assert differences(_tree(place), _tree(flat)) == []


def _tree(root: Path) -> dict[bytes, Item]:
    # Both are changed one after the other, so times differ.
    return {path: replace(item, mtime_ns=None) for path, item in read_tree(root).items()}


class TestLayers:
    def test_files_are_replaced(self, session: Session, tmp_path: Path) -> None:
        def low(root: Path) -> None:
            (root / "etc").mkdir(0o700)
            (root / "etc" / "hosts").write_text("10.0.0.1\n")
            (root / "etc" / "profile").write_text("PATH=/bin\n")

        def high(root: Path) -> None:
            (root / "etc" / "hosts").write_text("10.0.0.2\n")
            (root / "etc" / "profile").chmod(0o666)
            with (root / "etc" / "profile").open("a") as file:
                file.write("export PATH\n")
            (root / "root").mkdir(0o700)
            (root / "root" / ".bashrc").write_text("PATH=/sbin\n")

        check_layers(session, tmp_path / "flat", low, high)

    def test_files_and_directories_are_deleted(self, session: Session, tmp_path: Path) -> None:
        def low(root: Path) -> None:
            for name in ("kept", "deleted", "a/kept", "a/deleted", "b/c/deleted"):
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                (root / name).write_text(name)

        def high(root: Path) -> None:
            (root / "deleted").unlink()
            (root / "a" / "deleted").unlink()
            shutil.rmtree(root / "b")

        def above(root: Path) -> None:
            (root / "b").write_text("a file where a directory was")
            (root / "deleted").mkdir()

        check_layers(session, tmp_path / "flat", low, high, lambda root: None, above)

    def test_a_directory_that_was_made_anew_hides_those_below(
        self, session: Session, tmp_path: Path
    ) -> None:
        def low(root: Path) -> None:
            (root / "lib").mkdir(0o700)
            (root / "lib" / "hidden").touch()

        def high(root: Path) -> None:
            shutil.rmtree(root / "lib")
            (root / "lib").mkdir(0o750)
            (root / "lib" / "shown").touch()

        def above(root: Path) -> None:
            (root / "lib" / "new").touch()

        check_layers(session, tmp_path / "flat", low, high, above)

    def test_files_are_renamed(self, session: Session, tmp_path: Path) -> None:
        def low(root: Path) -> None:
            (root / "old").mkdir()
            (root / "old" / "first").write_text("was here first")
            (root / "old" / "second").write_text("nothing interesting")

        def high(root: Path) -> None:
            (root / "old" / "draft").write_text("new content")
            (root / "old" / "draft").rename(root / "old" / "first")
            (root / "old" / "second").rename(root / "third")
            (root / "made").mkdir()
            (root / "made").rename(root / "new")

        check_layers(session, tmp_path / "flat", low, high)

    def test_owners_and_modes_are_changed(self, session: Session, tmp_path: Path) -> None:
        def low(root: Path) -> None:
            (root / "opt" / "a").mkdir(parents=True, mode=0o700)
            (root / "opt" / "a" / "file").write_text("hello")
            (root / "opt" / "a" / "program").write_text("#!/bin/sh\n")
            (root / "tmp").mkdir()
            (root / "tmp").chmod(0o1777)

        def high(root: Path) -> None:
            os.chown(root / "opt", 1, 2)
            os.chown(root / "opt" / "a" / "file", 3, 4)
            os.chown(root / "opt" / "a" / "program", 0, 5)
            (root / "opt" / "a" / "program").chmod(0o4755)
            (root / "opt" / "a").chmod(0o500)

        def above(root: Path) -> None:
            shutil.rmtree(root / "tmp")
            (root / "tmp").mkdir()
            os.chown(root / "tmp", 1, 1)
            os.chown(root / "opt", 0, 0)

        check_layers(session, tmp_path / "flat", low, high, above)

    def test_the_root_directory_itself(self, session: Session, tmp_path: Path) -> None:
        def owned(root: Path) -> None:
            os.chown(root, 12, 34)

        check_layers(session, tmp_path / "flat", owned, write("file", "content"))

    def test_hard_links(self, session: Session, tmp_path: Path) -> None:
        def low(root: Path) -> None:
            (root / "a").mkdir()
            (root / "a" / "file").write_text("content")
            os.link(root / "a" / "file", root / "link")
            os.link(root / "link", root / "a" / "other")

        def high(root: Path) -> None:
            (root / "link").unlink()
            (root / "new").write_text("new")
            os.link(root / "new", root / "a" / "new")

        check_layers(session, tmp_path / "flat", low, write("unrelated", ""))
        session.calls.prepare("extract", "layer 0")
        with session.shown(session.calls.mounts("extract")) as place:
            high(place)
            first, second = (place / "new").stat(), (place / "a" / "new").stat()
            assert (first.st_ino, first.st_nlink) == (second.st_ino, second.st_nlink)
            assert {path.name for path in (place / "a").iterdir()} == {"file", "new", "other"}
            assert not (place / "link").exists()

    def test_other_kinds_of_files(self, session: Session, tmp_path: Path) -> None:
        def low(root: Path) -> None:
            (root / "symlink").symlink_to("/nowhere")
            os.mkfifo(root / "pipe", 0o600)
            os.mknod(root / "device", stat.S_IFCHR | 0o666, os.makedev(1, 3))
            (root / "attributed").write_text("content")
            os.setxattr(root / "attributed", "user.name", b"value")
            os.setxattr(root / "attributed", "trusted.name", b"value")
            with (root / "sparse").open("wb") as file:
                file.truncate(1 << 20)

        def high(root: Path) -> None:
            (root / "symlink").unlink()
            (root / "symlink").symlink_to("elsewhere")
            (root / "pipe").chmod(0o644)
            os.setxattr(root / "attributed", "user.name", b"other")

        check_layers(session, tmp_path / "flat", low, high)

    def test_a_chain_of_20(self, session: Session, tmp_path: Path) -> None:
        def layer(number: int) -> Callable[[Path], object]:
            def change(root: Path) -> None:
                (root / "all").write_text(f"{number}\n")
                (root / "own").mkdir(exist_ok=True)
                (root / "own" / f"{number}").write_text("same\n")
                if number:
                    shutil.rmtree(root / "last")
                (root / "last").mkdir()
                (root / "last" / f"{number}").touch()

            return change

        check_layers(session, tmp_path / "flat", *map(layer, range(20)))


# containerd 1.6 knows no such labels.
@pytest.mark.parametrize(
    "service", [name for name in SERVICES if name != "overlayfs in 1.6"], indirect=True
)
def test_root_of_a_user_namespace_owns_what_is_written(session: Session, service: Service) -> None:
    """containerd takes the options of its overlayfs out of the mounts, and maps the owners of lower
    layers; FirstByte has mapped them already.
    """
    labels = {
        "containerd.io/snapshot/uidmapping": "0:100000:65536",
        "containerd.io/snapshot/gidmapping": "0:200000:65536",
    }
    mapping: tuple[str, ...] = ()
    if service.daemon is None:
        mapping = ("uidmap=0:100000:65536", "gidmap=0:200000:65536")
    session.add_layer("low")
    (bind,) = session.calls.prepare("loose", labels=labels)
    assert bind.options == (*mapping, "rw", "rbind")
    assert _owner(bind.source) == (100000, 200000)

    (overlay,) = session.calls.prepare("active", "low", labels)
    found = tuple(option for option in overlay.options if "idmap=" in option)
    assert found == mapping
    (upper,) = (option for option in overlay.options if option.startswith("upperdir="))
    assert _owner(upper.removeprefix("upperdir=")) == (100000, 200000)
    assert session.calls.mounts("active") == (overlay,)


def _owner(path: str) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_uid, status.st_gid


class TestSharing:
    def test_writers_on_one_layer_do_not_see_each_other(self, session: Session) -> None:
        session.add_layer("low", change=write("file", "from below"))
        with (
            session.shown(session.calls.prepare("one", "low")) as one,
            session.shown(session.calls.prepare("two", "low")) as two,
            session.viewed("low") as view,
        ):
            (one / "file").write_text("from one")
            (two / "file").unlink()
            (two / "new").touch()
            assert os.listdir(one) == os.listdir(view) == ["file"]
            assert (view / "file").read_text() == "from below"
            assert os.listdir(two) == ["new"]
        with session.viewed("low") as place:
            assert (place / "file").read_text() == "from below"

    def test_what_was_written_is_there_when_it_is_mounted_again(self, session: Session) -> None:
        session.add_layer("low", change=write("file", "from below"))
        with session.shown(session.calls.prepare("active", "low")) as place:
            (place / "file").write_text("from a container")
        with session.shown(session.calls.mounts("active")) as place:
            assert (place / "file").read_text() == "from a container"

    @pytest.mark.parametrize("layers", [0, 1, 2])
    def test_a_view_cannot_be_changed(self, session: Session, layers: int) -> None:
        parent = ""
        for number in range(layers):
            session.add_layer(f"{number}", parent, write(f"{number}", "content"))
            parent = f"{number}"
        with session.shown(session.calls.view("view", parent)) as place:
            attempts: list[Callable[[], object]] = [
                lambda: (place / "new").touch(),
                lambda: (place / "new").mkdir(),
                lambda: place.chmod(0o700),
            ]
            if layers:
                attempts += [
                    lambda: (place / "0").write_text("changed"),
                    lambda: (place / "0").unlink(),
                    lambda: (place / "0").rename(place / "new"),
                    lambda: os.chown(place / "0", 1, 1),
                ]
            for attempt in attempts:
                with pytest.raises(OSError) as raised:  # noqa: PT011
                    attempt()
                assert raised.value.errno == errno.EROFS
            assert sorted(os.listdir(place)) == [f"{number}" for number in range(layers)]


class TestUsage:
    def test_an_active_snapshot_takes_what_was_written(self, session: Session) -> None:
        session.add_layer("low", change=write("below", "x" * 100_000))
        (mount,) = mounts = session.calls.prepare("active", "low")
        (upper,) = (option for option in mount.options if option.startswith("upperdir="))
        assert session.calls.usage("active") == _disk_usage(upper.removeprefix("upperdir="))
        assert session.calls.usage("active").inodes == 1
        with session.shown(mounts) as place:
            (place / "directory").mkdir()
            _write_through(place / "directory" / "file", b"x" * 1_000_000)
            os.link(place / "directory" / "file", place / "link")
            os.symlink("link", place / "symlink")
            usage = session.calls.usage("active")
        assert usage.inodes == 4
        assert usage.size >= 1_000_000
        assert usage == _disk_usage(upper.removeprefix("upperdir="))

    def test_a_committed_snapshot_takes_what_it_took(self, session: Session) -> None:
        with session.shown(session.calls.prepare("active")) as place:
            _write_through(place / "file", b"x" * 300_000)
        usage = session.calls.usage("active")
        session.calls.commit("low", "active")
        assert session.calls.usage("low") == usage
        session.calls.prepare("active", "low")
        assert session.calls.usage("active").inodes == 1
        assert session.calls.usage("low") == usage

    def test_a_view_takes_nothing(self, session: Session) -> None:
        session.add_layer("low", change=write("file", "x" * 100_000))
        session.calls.view("view", "low")
        session.calls.view("loose view")
        assert session.calls.usage("view") == Usage(inodes=0, size=0)
        assert session.calls.usage("loose view") == Usage(inodes=0, size=0)

    def test_of_what_is_not_there(self, session: Session) -> None:
        with session.refused(NOT_FOUND):
            session.calls.usage("missing")
        with session.refused(NO_NAME):
            session.calls.usage("")


def _write_through(path: Path, content: bytes) -> None:
    """So that the file system has settled how many blocks it takes."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _disk_usage(root: str) -> Usage:
    inodes = {}
    for path, directories, files in os.walk(root):
        for name in (".", *directories, *files):
            status = os.lstat(os.path.join(path, name))
            inodes[status.st_ino] = status.st_blocks * 512
    return Usage(inodes=len(inodes), size=sum(inodes.values()))
