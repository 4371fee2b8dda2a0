"""The mounts of a snapshot, as containerd's overlayfs snapshotter answers them."""

from __future__ import annotations

from pathlib import Path

import pytest

from snapshotter.containerd.errors import InvalidArgumentError
from snapshotter.containerd.overlay import (
    check_path,
    id_mapping,
    kernel_options,
    overlay_mounts,
    root_of,
)
from snapshotter.containerd.snapshots import Kind, Mount
from snapshotter.mounts.idmap import IdMapping
from snapshotter.store.errors import StoreError

OWN = Path("/root/5")
LOWERS = [Path("/root/4/fs"), Path("/fuse/image/3")]
UID = "containerd.io/snapshot/uidmapping"
GID = "containerd.io/snapshot/gidmapping"
MAPPED = {UID: "0:1000:65536", GID: "0:2000:65536"}


def test_without_a_parent_it_is_a_bind_of_its_own_directory() -> None:
    for kind, access in ((Kind.ACTIVE, "rw"), (Kind.VIEW, "ro")):
        assert overlay_mounts(kind, OWN, [], ["index=off"]) == (
            Mount("bind", "/root/5/fs", (access, "rbind")),
        )


def test_a_view_of_one_directory_is_a_read_only_bind_of_it() -> None:
    assert overlay_mounts(Kind.VIEW, OWN, LOWERS[1:], ["index=off"]) == (
        Mount("bind", "/fuse/image/3", ("ro", "rbind")),
    )


def test_a_view_of_several_has_no_upper_directory() -> None:
    assert overlay_mounts(Kind.VIEW, OWN, LOWERS, ["index=off"]) == (
        Mount("overlay", "overlay", ("lowerdir=/root/4/fs:/fuse/image/3", "index=off")),
    )


@pytest.mark.parametrize("lowers", [LOWERS, LOWERS[:1]])
def test_an_active_snapshot_is_an_overlay(lowers: list[Path]) -> None:
    assert overlay_mounts(Kind.ACTIVE, OWN, lowers, ["userxattr", "index=off"]) == (
        Mount(
            "overlay",
            "overlay",
            (
                "workdir=/root/5/work",
                "upperdir=/root/5/fs",
                "lowerdir=" + ":".join(map(str, lowers)),
                "userxattr",
                "index=off",
            ),
        ),
    )


def test_the_kernel_of_this_machine_is_asked() -> None:
    known = Path("/sys/module/overlay/parameters/index").exists()
    assert kernel_options() == (("index=off",) if known else ())


@pytest.mark.parametrize("name", ["a:b", "a,b", "a\\b"])
def test_paths_that_overlay_options_cannot_name_are_refused(name: str) -> None:
    with pytest.raises(StoreError, match="choose another directory"):
        check_path(Path("/var/lib") / name)


def test_other_paths_are_fine() -> None:
    check_path(Path("/var/lib/with space/ünïcode=1"))


@pytest.mark.parametrize(
    ("labels", "owner"),
    [
        ({}, None),
        ({UID: "", GID: ""}, None),
        (MAPPED, (1000, 2000)),
        ({UID: "1:5:10,0:1000:1"}, (1000, 0)),
        ({GID: "0:2000:1"}, (0, 2000)),
    ],
)
def test_the_owner_is_root_of_the_user_namespace(
    labels: dict[str, str], owner: tuple[int, int] | None
) -> None:
    mapping = id_mapping(labels)
    assert (mapping and root_of(mapping)) == owner


def test_all_ranges_of_a_mapping_count() -> None:
    ranges = [(1, 5, 10), (0, 1000, 1)]
    assert id_mapping({UID: "1:5:10,0:1000:1"}) == IdMapping(ranges, [(0, 0, 2**32 - 1)])


@pytest.mark.parametrize(
    "mapping",
    [
        "0:1000",
        "0:1000:1:1",
        "a:b:c",
        "1:1000:5",
        "0:1000:0",
        "0:-1:5",
        "0:4294967295:1",
        "0:²:1",
        ",",
        "0:" + "9" * 5000 + ":1",
    ],
)
def test_mappings_that_make_no_sense(mapping: str) -> None:
    with pytest.raises(InvalidArgumentError):
        id_mapping({UID: mapping})
