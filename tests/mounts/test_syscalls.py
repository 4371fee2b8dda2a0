"""Mounting and unmounting with the real kernel, and errors that say what to do."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from snapshotter.mounts import syscalls
from snapshotter.mounts.errors import MountBusyError, MountError, MountPointError
from snapshotter.mounts.mountpoint import check_mount_point
from snapshotter.mounts.syscalls import MountFlag
from snapshotter.mounts.table import mount_at
from tests.support.nobody import as_nobody

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.root


@pytest.fixture
def tmpfs(tmp_path: Path) -> Iterator[Path]:
    """A file system of our own, with a name that the mount table has to escape."""
    point = tmp_path / "with space\tand\\tab"
    point.mkdir()
    syscalls.mount("test", point, "tmpfs", MountFlag.NO_DEVICES, "size=1m")
    yield point
    while mount_at(point) is not None:
        syscalls.unmount(point, detach=True)


def test_mount_and_unmount(tmpfs: Path) -> None:
    entry = mount_at(tmpfs)
    assert entry is not None
    assert (entry.kind, entry.source) == (b"tmpfs", b"test")
    assert b"nodev" in entry.options
    syscalls.unmount(tmpfs)
    assert mount_at(tmpfs) is None


def test_a_bind_shows_a_part_of_the_tree_with_its_flags_and_is_private(
    tmpfs: Path, tmp_path: Path
) -> None:
    (tmpfs / "part").mkdir()
    (tmpfs / "part" / "file").write_text("content")
    target = tmp_path / "target"
    target.mkdir()
    syscalls.bind(tmpfs / "part", target)
    try:
        assert (target / "file").read_text() == "content"
        entry = mount_at(target)
        assert entry is not None
        assert entry.root == b"/part"
        assert b"nodev" in entry.options
        assert entry.optional == ()
    finally:
        syscalls.unmount(target)


def test_a_mount_in_use_is_busy_and_the_error_says_how_to_find_out(tmpfs: Path) -> None:
    (tmpfs / "file").touch()
    with (
        (tmpfs / "file").open("rb"),
        pytest.raises(MountBusyError, match=r"is in use: .*fuser -vm"),
    ):
        syscalls.unmount(tmpfs)
    assert mount_at(tmpfs) is not None


def test_detaching_works_while_in_use(tmpfs: Path) -> None:
    (tmpfs / "file").write_text("content")
    with (tmpfs / "file").open() as file:
        syscalls.unmount(tmpfs, detach=True)
        assert mount_at(tmpfs) is None
        assert file.read() == "content"


def test_unmounting_where_nothing_is_mounted_says_so(tmp_path: Path) -> None:
    with pytest.raises(MountPointError, match="nothing is mounted at"):
        syscalls.unmount(tmp_path)


def test_an_unknown_file_system_says_which_module_is_missing(tmp_path: Path) -> None:
    with pytest.raises(MountError, match="no file system nosuchfs: load it: modprobe nosuchfs"):
        syscalls.mount("x", tmp_path, "nosuchfs.sub", MountFlag(0))


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(MountPointError, match="make the directory first"):
        syscalls.mount("x", tmp_path / "none", "tmpfs", MountFlag(0))


def test_without_root_the_error_says_so() -> None:
    program = (
        "try: syscalls.mount('x', Path('/tmp'), 'tmpfs', syscalls.MountFlag(0))\n"
        "except MountError as error: print(error)\n"
    )
    imports = (
        "from pathlib import Path\n"
        "from snapshotter.mounts import syscalls\n"
        "from snapshotter.mounts.errors import MountError\n"
    )
    done = as_nobody(program, imports=imports)
    assert done.stdout == "no permission to mount /tmp: run this as root\n"


def test_a_copy_of_a_mount_can_be_attached_elsewhere(tmpfs: Path, tmp_path: Path) -> None:
    (tmpfs / "part" / "below").mkdir(parents=True)
    target = tmp_path / "target"
    target.mkdir()
    tree = syscalls.clone_tree(tmpfs / "part")
    try:
        syscalls.attach(tree, target)
    finally:
        os.close(tree)
    try:
        entry = mount_at(target)
        assert entry is not None
        assert (entry.kind, entry.root) == (b"tmpfs", b"/part")
        assert os.listdir(target) == ["below"]
    finally:
        syscalls.unmount(target)


def test_calls_on_trees_name_what_they_were_about(tmpfs: Path) -> None:
    with pytest.raises(MountPointError, match=r"cannot copy the mount of .*/none: No such file"):
        syscalls.clone_tree(tmpfs / "none")
    tree = syscalls.clone_tree(tmpfs)
    try:
        with pytest.raises(MountPointError, match=r"cannot mount at .*/none: No such file"):
            syscalls.attach(tree, tmpfs / "none")
        with pytest.raises(MountError, match=r"cannot map the owners of .*with space"):
            syscalls.set_idmap(tree, tree, tmpfs)  # a directory is no user namespace
    finally:
        os.close(tree)


def test_a_kernel_without_a_call_is_told_from_a_refusal(
    tmpfs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(syscalls, "_OPEN_TREE", 100_000)
    with pytest.raises(MountError, match=r"this kernel cannot copy the mount of .*: Linux 5"):
        syscalls.clone_tree(tmpfs)


def test_an_empty_directory_may_become_a_mount_point(tmp_path: Path) -> None:
    check_mount_point(tmp_path)


def test_what_is_no_empty_directory_may_not(tmpfs: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(MountPointError, match="is not empty"):
        check_mount_point(tmp_path)
    with pytest.raises(MountPointError, match="is not a directory"):
        check_mount_point(file)
    with pytest.raises(MountPointError, match="does not exist: mkdir -p"):
        check_mount_point(tmp_path / "none")
    with pytest.raises(MountPointError, match="is a mount point already"):
        check_mount_point(tmpfs)
    assert os.path.ismount(tmpfs)
