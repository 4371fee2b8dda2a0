"""Snapshots for user namespaces: layers through idmapped mounts, which come and go with them."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from snapshotter.containerd.errors import (
    AlreadyExistsError,
    FailedPreconditionError,
    UnavailableError,
)
from snapshotter.containerd.snapshotter import Snapshotter
from snapshotter.mounts import syscalls
from snapshotter.mounts.errors import MountError
from snapshotter.mounts.syscalls import MountFlag
from snapshotter.mounts.table import read_mounts
from tests.support.lazy_images import DirectoryImages, digest, layer_labels, mounted

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from snapshotter.containerd.snapshots import Mount

pytestmark = pytest.mark.root

MAPPED = {
    "containerd.io/snapshot/uidmapping": "0:100000:65536",
    "containerd.io/snapshot/gidmapping": "0:200000:65536",
}
NO_LABELS: Mapping[str, str] = {}


@pytest.fixture
def images(tmp_path: Path) -> DirectoryImages:
    return DirectoryImages(tmp_path / "images")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "idmapped"


@pytest.fixture
def snapshotter(tmp_path: Path, images: DirectoryImages, folder: Path) -> Iterator[Snapshotter]:
    made = Snapshotter(tmp_path / "root", images, folder)
    yield made
    made.unmount()
    made.close()
    assert shown(folder) == []


@pytest.fixture
async def image(snapshotter: Snapshotter, images: DirectoryImages, tmp_path: Path) -> str:
    """The name of a snapshot: an ordinary layer on a lazy one, each with a file."""
    images.add("image", "lazy")
    os.chown(await images.lower(digest("image"), 1) / "lazy", 7, 8)
    with pytest.raises(AlreadyExistsError):
        await snapshotter.prepare("extract", "", layer_labels("image", "lazy", "chain"))
    with mounted(await snapshotter.prepare("build", digest("chain"), {}), tmp_path / "m") as root:
        (root / "ordinary").write_text("ordinary\n")
        os.chown(root / "ordinary", 9, 10)
    await snapshotter.commit("image", "build", NO_LABELS, "")
    return "image"


def shown(folder: Path) -> list[str]:
    """The mounts in a folder, by their paths in it; a path twice if they lie on each other."""
    prefix = os.fsencode(folder) + b"/"
    points = (entry.point for entry in read_mounts())
    return sorted(point.removeprefix(prefix).decode() for point in points if prefix in point)


def lowers(mounts: Sequence[Mount]) -> list[str]:
    (option,) = (each for each in mounts[0].options if each.startswith("lowerdir="))
    return option.removeprefix("lowerdir=").split(":")


def owner(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_uid, status.st_gid


async def test_owners_are_those_of_the_namespace(
    snapshotter: Snapshotter, image: str, tmp_path: Path
) -> None:
    mounts = await snapshotter.prepare("container", image, MAPPED)
    assert not any(option.startswith(("uidmap", "gidmap")) for option in mounts[0].options)
    with mounted(mounts, tmp_path / "c") as root:
        assert owner(root) == (100_000, 200_000)
        assert owner(root / "ordinary") == (100_009, 200_010)
        assert owner(root / "lazy") == (100_007, 200_008)
        with (root / "lazy").open("a") as file:
            file.write("more\n")
        assert owner(root / "lazy") == (100_007, 200_008)
        assert (root / "lazy").read_text() == "lazy of image\nmore\n"
    with mounted(await snapshotter.prepare("plain", image, NO_LABELS), tmp_path / "c") as root:
        assert owner(root / "ordinary") == (9, 10)
        assert (root / "lazy").read_text() == "lazy of image\n"


async def test_views_are_mapped_too(snapshotter: Snapshotter, image: str, tmp_path: Path) -> None:
    for parent in (image, digest("chain")):  # an overlay, and a bind mount
        with mounted(await snapshotter.view(f"of {parent}", parent, MAPPED), tmp_path / "v") as at:
            assert owner(at / "lazy") == (100_007, 200_008)
            with pytest.raises(OSError, match="Read-only"):
                (at / "new").touch()


async def test_without_layers_there_is_nothing_to_map(
    snapshotter: Snapshotter, folder: Path, tmp_path: Path
) -> None:
    with mounted(await snapshotter.prepare("key", "", MAPPED), tmp_path / "c") as root:
        assert owner(root) == (100_000, 200_000)
    assert shown(folder) == []


async def test_mounts_are_the_same_whenever_they_are_asked_for(
    snapshotter: Snapshotter, image: str, folder: Path
) -> None:
    before = await snapshotter.prepare("container", image, MAPPED)
    made = shown(folder)
    assert len(made) == 2
    assert await snapshotter.mounts("container") == before
    assert shown(folder) == made


@pytest.mark.parametrize("end", ["remove", "commit"])
async def test_they_go_with_the_snapshot_while_a_container_runs(
    snapshotter: Snapshotter, image: str, folder: Path, tmp_path: Path, end: str
) -> None:
    other = await snapshotter.prepare("other", image, MAPPED)
    with mounted(await snapshotter.prepare("container", image, MAPPED), tmp_path / "c") as root:
        if end == "remove":
            await snapshotter.remove("container")
        else:
            await snapshotter.commit("layer", "container", NO_LABELS, "")
        assert owner(root / "lazy") == (100_007, 200_008)
    assert [str(folder / point) for point in shown(folder)] == lowers(other)
    assert len(os.listdir(folder)) == 1


async def test_a_successor_finds_them(
    snapshotter: Snapshotter, images: DirectoryImages, image: str, tmp_path: Path, folder: Path
) -> None:
    before = await snapshotter.prepare("container", image, MAPPED)
    made = shown(folder)
    successor = Snapshotter(tmp_path / "root", images, folder)
    await successor.recover()
    assert await successor.mounts("container") == before
    assert shown(folder) == made
    successor.close()


async def test_what_is_gone_is_shown_again(
    snapshotter: Snapshotter, image: str, folder: Path
) -> None:
    before = await snapshotter.prepare("container", image, MAPPED)
    made = shown(folder)
    snapshotter.unmount()
    assert not os.listdir(folder)
    assert await snapshotter.mounts("container") == before
    assert shown(folder) == made


async def test_an_image_that_is_elsewhere_now_is_shown_from_there(
    snapshotter: Snapshotter, images: DirectoryImages, image: str, tmp_path: Path, folder: Path
) -> None:
    mounts = await snapshotter.prepare("container", image, MAPPED)
    made = shown(folder)
    lower = await images.lower(digest("image"), 1)
    lower.rename(lower.parent / "old")
    lower.mkdir()
    (lower / "other").touch()
    assert await snapshotter.mounts("container") == mounts
    assert shown(folder) == made
    with mounted(mounts, tmp_path / "c") as root:
        assert owner(root / "other") == (100_000, 200_000)


async def test_leftovers_are_taken_down(snapshotter: Snapshotter, image: str, folder: Path) -> None:
    """Of a crash while a snapshot was made or removed."""
    await snapshotter.prepare("container", image, MAPPED)
    made = shown(folder)
    (folder / "77" / "0").mkdir(parents=True)
    syscalls.bind(folder.parent, folder / "77" / "0")
    await snapshotter.recover()
    assert shown(folder) == made
    assert not (folder / "77").exists()


async def test_a_copy_with_the_containers_owners_is_shown_as_it_is(
    snapshotter: Snapshotter, image: str, tmp_path: Path
) -> None:
    """containerd makes one if it is not told of remap-ids, and sends the labels all the same."""
    with mounted(await snapshotter.prepare("copy", image, NO_LABELS), tmp_path / "m") as root:
        for path, shift in ((root, 0), (root / "lazy", 7), (root / "ordinary", 9)):
            os.chown(path, 100_000 + shift, 200_000 + shift)
    await snapshotter.commit("remapped", "copy", NO_LABELS, "")
    with mounted(await snapshotter.prepare("c", "remapped", MAPPED), tmp_path / "c") as root:
        assert owner(root) == (100_000, 200_000)
        assert owner(root / "lazy") == (100_007, 200_007)


async def test_a_file_system_that_cannot_be_mapped_is_said(
    snapshotter: Snapshotter, images: DirectoryImages, image: str, folder: Path
) -> None:
    lower = await images.lower(digest("image"), 1)
    syscalls.mount("proc", lower, "proc", MountFlag.READ_ONLY)
    try:
        with pytest.raises(FailedPreconditionError, match=r"does not idmap this proc.*remap-ids"):
            await snapshotter.prepare("container", image, MAPPED)
    finally:
        syscalls.unmount(lower)
    assert {info.name for info in await snapshotter.list([])} == {digest("chain"), image}
    assert shown(folder) == []


async def test_a_failure_leaves_nothing(
    snapshotter: Snapshotter,
    image: str,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    attached: list[Path] = []
    really = syscalls.attach

    def attach(tree: int, target: Path) -> None:
        if attached:
            raise MountError("no more mounts")
        attached.append(target)
        really(tree, target)

    monkeypatch.setattr(syscalls, "attach", attach)
    directories = tmp_path / "root" / "containerd" / "snapshots"
    before = os.listdir(directories)
    with pytest.raises(UnavailableError, match="no more mounts"):
        await snapshotter.prepare("container", image, MAPPED)
    assert os.listdir(directories) == before
    assert os.listdir(folder) == shown(folder) == []
    assert {info.name for info in await snapshotter.list([])} == {digest("chain"), image}
