"""The ten calls, with real overlay mounts, for snapshots as any snapshotter has them."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest
import trio

from snapshotter.containerd.directories import Directories
from snapshotter.containerd.errors import (
    AlreadyExistsError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
)
from snapshotter.containerd.metadata import Metadata
from snapshotter.containerd.snapshots import Kind, Usage
from snapshotter.containerd.snapshotter import Snapshotter
from snapshotter.store.errors import StoreError
from tests.support.lazy_images import (
    DirectoryImages,
    digest,
    listing,
    mounted,
)
from tests.support.unpacking import pull_lazily, write_layer

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from snapshotter.containerd.calls import Service

pytestmark = pytest.mark.root

NO_LABELS: Mapping[str, str] = {}


async def test_it_is_the_service_that_the_server_calls(snapshotter: Snapshotter) -> None:
    service: Service = snapshotter
    assert await service.list([]) == []


async def test_layers_and_a_container_as_of_overlayfs(
    snapshotter: Snapshotter, tmp_path: Path
) -> None:
    first, second = {"foo": "foo", "both": "1"}, {"bar": "bar", "both": "2"}
    await write_layer(snapshotter, "one", "", first, tmp_path)
    await write_layer(snapshotter, "two", "one", second, tmp_path)
    with mounted(await snapshotter.prepare("container", "two", NO_LABELS), tmp_path / "c") as root:
        assert {path.name: path.read_text() for path in root.iterdir()} == first | second
        (root / "foo").unlink()
        (root / "new").write_text("new")
        assert (root.stat().st_mode & 0o7777, root.stat().st_uid) == (0o755, 0)
    with mounted(await snapshotter.mounts("container"), tmp_path / "c") as root:
        assert listing(root) == {"bar", "both", "new"}
    for name, shown in (("two", {"foo", "bar", "both"}), ("one", {"foo", "both"})):
        mounts = await snapshotter.view(f"view {name}", name, NO_LABELS)
        assert await snapshotter.mounts(f"view {name}") == mounts
        with mounted(mounts, tmp_path / "v") as root:
            assert listing(root) == shown
            with pytest.raises(OSError, match="Read-only"):
                (root / "file").write_text("no")


async def test_without_a_parent_it_is_an_empty_directory(
    snapshotter: Snapshotter, tmp_path: Path
) -> None:
    with mounted(await snapshotter.prepare("active", "", NO_LABELS), tmp_path / "m") as root:
        (root / "file").write_text("content")
    with mounted(await snapshotter.view("view", "", NO_LABELS), tmp_path / "m") as root:
        with pytest.raises(OSError, match="Read-only"):
            (root / "file").write_text("no")
        assert listing(root) == set()


async def test_errors_are_those_of_containerd(snapshotter: Snapshotter, tmp_path: Path) -> None:
    await write_layer(snapshotter, "base", "", {}, tmp_path)
    await snapshotter.prepare("active", "base", NO_LABELS)
    await snapshotter.view("view", "base", NO_LABELS)
    with pytest.raises(FailedPreconditionError):
        await snapshotter.mounts("base")
    with pytest.raises(FailedPreconditionError):
        await snapshotter.remove("base")
    with pytest.raises(FailedPreconditionError):
        await snapshotter.commit("name", "view", NO_LABELS, "")
    with pytest.raises(AlreadyExistsError):
        await snapshotter.commit("base", "active", NO_LABELS, "")
    with pytest.raises(AlreadyExistsError):
        await snapshotter.view("active", "base", NO_LABELS)
    with pytest.raises(InvalidArgumentError):
        await snapshotter.prepare("new", "active", NO_LABELS)
    with pytest.raises(InvalidArgumentError):
        await snapshotter.commit("name", "active", NO_LABELS, "another")
    with pytest.raises(InvalidArgumentError):
        await snapshotter.list(["name="])
    for call in (snapshotter.mounts, snapshotter.stat, snapshotter.usage, snapshotter.remove):
        with pytest.raises(NotFoundError):
            await call("nothing")
    with pytest.raises(NotFoundError):
        await snapshotter.commit("name", "nothing", NO_LABELS, "")
    with pytest.raises(NotFoundError):
        await snapshotter.prepare("new", "nothing", NO_LABELS)


async def test_a_failed_prepare_leaves_no_directory(
    snapshotter: Snapshotter, directories: Path
) -> None:
    await snapshotter.prepare("key", "", NO_LABELS)
    with pytest.raises(AlreadyExistsError):
        await snapshotter.prepare("key", "", NO_LABELS)
    bad = {"containerd.io/snapshot/uidmapping": "nonsense"}
    with pytest.raises(InvalidArgumentError):
        await snapshotter.prepare("other", "", bad)
    assert len(listing(directories)) == 1


async def test_one_of_many_prepares_of_a_key_wins(
    snapshotter: Snapshotter, directories: Path
) -> None:
    results = []

    async def attempt() -> None:
        try:
            results.append(await snapshotter.prepare("key", "", NO_LABELS))
        except AlreadyExistsError:
            results.append(())

    async with trio.open_nursery() as nursery:
        for _ in range(12):
            nursery.start_soon(attempt)
    assert len(results) == 12
    assert [result for result in results if result] == [await snapshotter.mounts("key")]
    assert len(listing(directories)) == 1


async def test_many_keys_side_by_side_with_cleanups(
    snapshotter: Snapshotter, directories: Path
) -> None:
    async def live(number: int) -> None:
        for turn in range(5):
            mounts = await snapshotter.prepare(f"{number}", "", NO_LABELS)
            assert await trio.Path(mounts[0].source).is_dir()
            if turn < 4:
                await snapshotter.remove(f"{number}")
            await snapshotter.cleanup()

    async with trio.open_nursery() as nursery:
        for number in range(10):
            nursery.start_soon(live, number)
    await snapshotter.cleanup()
    assert len(listing(directories)) == 10
    for number in range(10):
        mounts = await snapshotter.mounts(f"{number}")
        assert await trio.Path(mounts[0].source).is_dir()


async def test_a_cleanup_spares_what_is_made_while_it_looks(
    snapshotter: Snapshotter, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = []

    def interrupted(look: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def looking(self: object) -> object:
            looks.append(look)
            if len(looks) == 2:
                trio.from_thread.run(snapshotter.prepare, "key", "", NO_LABELS)
            return look(self)

        return looking

    monkeypatch.setattr(Directories, "names", interrupted(Directories.names))
    monkeypatch.setattr(Metadata, "ids", interrupted(Metadata.ids))
    await snapshotter.cleanup()
    assert len(looks) == 2
    (mount,) = await snapshotter.mounts("key")
    assert await trio.Path(mount.source).is_dir()


async def test_the_owner_is_inherited_as_in_containerd(
    snapshotter: Snapshotter, tmp_path: Path, images: DirectoryImages
) -> None:
    labels = {
        "containerd.io/snapshot/uidmapping": "0:1000:65536",
        "containerd.io/snapshot/gidmapping": "0:2000:65536",
    }
    mounts = await snapshotter.prepare("extract", "", labels)
    assert mounts[0].options == ("rw", "rbind")
    source = trio.Path(mounts[0].source)
    assert ((await source.stat()).st_uid, (await source.stat()).st_gid) == (1000, 2000)
    await source.chmod(0o700)
    await snapshotter.commit("base", "extract", NO_LABELS, "")
    with mounted(await snapshotter.prepare("container", "base", NO_LABELS), tmp_path / "c") as root:
        status = root.stat()
    # The mode is not: an image whose root directory nobody else may enter works in containerd.
    assert (status.st_uid, status.st_gid, status.st_mode & 0o7777) == (1000, 2000, 0o755)
    images.add("image", "a")
    os.chown(await images.lower(digest("image"), 1), 3000, 4000)
    top = await pull_lazily(snapshotter, "image", "a")
    with mounted(await snapshotter.prepare("lazy", top, NO_LABELS), tmp_path / "c") as root:
        assert (root.stat().st_uid, root.stat().st_gid) == (0, 0)


async def test_labels_are_replaced_by_commit_and_changed_by_update(
    snapshotter: Snapshotter,
) -> None:
    await snapshotter.prepare("key", "", {"a": "1"})
    await snapshotter.commit("name", "key", {"b": "2"}, "")
    assert (await snapshotter.stat("name")).labels == {"b": "2"}
    updated = await snapshotter.update("name", {"c": "3"}, ["labels.c"])
    assert updated == await snapshotter.stat("name")
    assert updated.labels == {"b": "2", "c": "3"}
    with pytest.raises(InvalidArgumentError):
        await snapshotter.update("name", {}, ["parent"])


async def test_usage_is_scanned_while_active_and_stored_at_commit(
    snapshotter: Snapshotter,
) -> None:
    mounts = await snapshotter.prepare("key", "", NO_LABELS)
    file = trio.Path(mounts[0].source) / "file"
    assert (await snapshotter.usage("key")).inodes == 1
    await file.write_bytes(b"x" * 100_000)
    usage = await snapshotter.usage("key")
    assert usage.inodes == 2
    assert usage.size >= 100_000
    await snapshotter.commit("name", "key", NO_LABELS, "")
    await file.unlink()
    assert await snapshotter.usage("name") == usage
    await snapshotter.view("view", "name", NO_LABELS)
    assert await snapshotter.usage("view") == Usage(0, 0)


async def test_remove_frees_the_name_and_cleanup_the_disk(
    snapshotter: Snapshotter, directories: Path, tmp_path: Path
) -> None:
    mounts = await snapshotter.prepare("key", "", NO_LABELS)
    with mounted(mounts, tmp_path / "m") as root:  # a container that is still running
        (root / "file").write_text("content")
        await snapshotter.remove("key")
        await snapshotter.cleanup()
        assert listing(directories) == set()
    await snapshotter.prepare("key", "", NO_LABELS)


async def test_lost_files_are_said_at_start(
    snapshotter: Snapshotter, directories: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (mount,) = await snapshotter.prepare("container", "", NO_LABELS)
    await trio.Path(mount.source).rmdir()
    await snapshotter.recover()
    assert "the files of snapshot container" in caplog.text
    assert (await snapshotter.stat("container")).kind is Kind.ACTIVE


def test_nobody_else_can_look_into_it(tmp_path: Path, images: DirectoryImages) -> None:
    Snapshotter(tmp_path / "new" / "root", images, tmp_path / "idmapped").close()
    assert (tmp_path / "new" / "root" / "containerd").stat().st_mode & 0o7777 == 0o700


def test_a_root_that_overlay_cannot_name_is_refused_at_start(
    tmp_path: Path, images: DirectoryImages
) -> None:
    with pytest.raises(StoreError, match="cannot be used for overlay"):
        Snapshotter(tmp_path / "with,comma", images, tmp_path / "idmapped")
    assert not (tmp_path / "with,comma").exists()
