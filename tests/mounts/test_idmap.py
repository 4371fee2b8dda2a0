"""Idmapped mounts of real file systems, and whether a directory can have them."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from snapshotter.mounts import idmap, syscalls
from snapshotter.mounts.errors import MountError
from snapshotter.mounts.idmap import IdMapping, can_idmap, clone_idmapped, user_namespace
from snapshotter.mounts.syscalls import MountFlag
from snapshotter.mounts.table import read_mounts
from tests.support.nobody import NOBODY, as_nobody

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.root

ROOT = IdMapping([(0, 0, 1)], [(0, 0, 1)])


def owner(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_uid, status.st_gid


def children() -> set[str]:
    with open(f"/proc/self/task/{os.getpid()}/children") as file:
        return set(file.read().split())


@pytest.fixture
def tmpfs(tmp_path: Path) -> Iterator[Path]:
    point = tmp_path / "tmpfs"
    point.mkdir()
    syscalls.mount("test", point, "tmpfs", MountFlag.NO_DEVICES, "size=1m")
    yield point
    syscalls.unmount(point, detach=True)


def test_owners_are_shifted_into_the_namespace_and_back(tmpfs: Path, tmp_path: Path) -> None:
    for uid in (0, 7, 99, 100):
        (tmpfs / str(uid)).touch()
        os.chown(tmpfs / str(uid), uid, uid)
    target = tmp_path / "target"
    target.mkdir()
    with user_namespace(IdMapping([(0, 100_000, 100)], [(0, 200_000, 7), (7, 7, 93)])) as namespace:
        tree = clone_idmapped(tmpfs, namespace)
        syscalls.attach(tree, target)
        os.close(tree)
    try:
        assert owner(target / "0") == (100_000, 200_000)
        assert owner(target / "7") == (100_007, 7)
        assert owner(target / "99") == (100_099, 99)
        assert owner(target / "100") == (NOBODY, NOBODY)
        assert owner(tmpfs / "7") == (7, 7)
    finally:
        syscalls.unmount(target)


def test_a_tree_that_is_attached_nowhere_goes_with_its_descriptor(tmpfs: Path) -> None:
    (tmpfs / "file").write_text("content")
    tree = syscalls.clone_tree(tmpfs)
    try:
        with open(os.open("file", os.O_RDONLY, dir_fd=tree)) as file:
            assert file.read() == "content"
    finally:
        os.close(tree)
    syscalls.unmount(tmpfs)  # else it would be busy
    syscalls.mount("test", tmpfs, "tmpfs", MountFlag.NO_DEVICES, "size=1m")


def test_a_file_system_that_can_be_idmapped_is_told_by_trying(tmpfs: Path) -> None:
    support = can_idmap(tmpfs)
    assert support
    assert support.reason == ""


def test_one_that_cannot_be_has_a_reason_with_its_name(tmp_path: Path) -> None:
    directory = tmp_path / "proc"
    directory.mkdir()
    syscalls.mount("proc", directory, "proc", MountFlag.READ_ONLY)
    try:
        support = can_idmap(directory)
    finally:
        syscalls.unmount(directory)
    assert not support
    assert support.reason == f"Linux {os.uname().release} does not idmap this proc file system"


def test_trying_leaves_nothing_behind(tmpfs: Path) -> None:
    def state() -> object:
        device = os.stat(tmpfs).st_dev
        mounts = [entry for entry in read_mounts() if os.makedev(*entry.device) == device]
        return mounts, os.listdir("/proc/self/fd"), children()

    before = state()
    for directory in (tmpfs, tmpfs / "none"):
        can_idmap(directory)
    assert state() == before


def test_a_missing_directory_is_the_reason(tmp_path: Path) -> None:
    support = can_idmap(tmp_path / "none")
    assert not support
    assert "No such file or directory" in support.reason


def test_without_root_the_reason_says_so(tmp_path: Path) -> None:
    done = as_nobody(
        "print(can_idmap(Path('/')).reason)",
        imports="from pathlib import Path\nfrom snapshotter.mounts.idmap import can_idmap\n",
    )
    assert done.stdout.endswith("run this as root\n")


def test_no_process_stays_in_the_namespace() -> None:
    before = children()
    with user_namespace(ROOT):
        assert children() == before


def test_a_namespace_that_is_refused_has_the_kernels_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(idmap, "_CHILD", "print(28)")
    with (
        pytest.raises(MountError, match=r"No space left on device: see user\.max_user_n"),
        user_namespace(ROOT),
    ):
        pass


def test_a_child_that_dies_or_is_silent_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    before = children()
    monkeypatch.setattr(idmap, "_CHILD", "")
    assert "the process died" in can_idmap(tmp_path).reason
    monkeypatch.setattr(idmap, "_CHILD", "import time; time.sleep(1000)")
    monkeypatch.setattr(idmap, "_CHILD_SECONDS", 0.2)
    assert "no user namespace was made in 0.2 s" in can_idmap(tmp_path).reason
    assert children() == before


def test_a_mapping_that_the_kernel_refuses_is_an_error() -> None:
    with (
        pytest.raises(MountError, match="no user namespace can be set up: Invalid argument"),
        user_namespace(IdMapping([(0, 0, 0)], [])),
    ):
        pass
