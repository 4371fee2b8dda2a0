"""The ten calls, with real overlay mounts, over images that are served from directories."""

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
    UnavailableError,
)
from snapshotter.containerd.metadata import Metadata
from snapshotter.containerd.snapshots import Kind, Mount, Usage
from snapshotter.containerd.snapshotter import Snapshotter
from snapshotter.store.errors import StoreError
from tests.support.lazy_images import (
    DirectoryImages,
    content_key,
    digest,
    layer_labels,
    listing,
    mounted,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from snapshotter.containerd.calls import Service

pytestmark = pytest.mark.root

NO_LABELS: Mapping[str, str] = {}


@pytest.fixture
def images(tmp_path: Path) -> DirectoryImages:
    return DirectoryImages(tmp_path / "images")


@pytest.fixture
def snapshotter(tmp_path: Path, images: DirectoryImages) -> Iterator[Snapshotter]:
    snapshotter = Snapshotter(tmp_path / "root", images, tmp_path / "idmapped")
    yield snapshotter
    snapshotter.close()


@pytest.fixture
def directories(tmp_path: Path) -> Path:
    return tmp_path / "root" / "containerd" / "snapshots"


async def write_layer(
    snapshotter: Snapshotter, name: str, parent: str, files: Mapping[str, str], folder: Path
) -> None:
    """Unpack a layer as containerd does: prepare, mount, write, unmount, commit."""
    mounts = await snapshotter.prepare(f"extract {name}", parent, NO_LABELS)
    with mounted(mounts, folder / "unpacking") as root:
        for path, content in files.items():
            (root / path).write_text(content)
    await snapshotter.commit(name, f"extract {name}", NO_LABELS, "")


async def pull_lazily(snapshotter: Snapshotter, image: str, *layers: str, parent: str = "") -> str:
    """Prepare all layers as containerd does; the name of the topmost snapshot."""
    for number, layer in enumerate(layers):
        target = f"chain {' '.join(layers[: number + 1])}"
        labels = layer_labels(image, layer, target)
        with pytest.raises(AlreadyExistsError, match="target snapshot"):
            await snapshotter.prepare(f"ns/{image}/{layer}", parent, labels)
        parent = await find(snapshotter, digest(target), parent)
    return parent


async def find(snapshotter: Snapshotter, target: str, parent: str) -> str:
    """What containerd looks for after ALREADY_EXISTS (core/metadata/snapshot.go)."""
    (found,) = await snapshotter.list(
        [f'labels."containerd.io/snapshot.ref"=={target},parent=="{parent}"']
    )
    assert (found.kind, found.parent) == (Kind.COMMITTED, parent)
    assert found.labels["containerd.io/snapshot.ref"] == target
    return found.name


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


async def test_a_lazy_layer_is_a_committed_snapshot_at_once(
    snapshotter: Snapshotter, images: DirectoryImages, directories: Path
) -> None:
    images.add("image", "a", "b")
    top = await pull_lazily(snapshotter, "image", "a", "b")
    assert top == digest("chain a b")
    info = await snapshotter.stat(top)
    assert (info.kind, info.parent) == (Kind.COMMITTED, digest("chain a"))
    assert info.labels == {
        **layer_labels("image", "b", "chain a b"),
        "containerd.io/snapshot/remote": "remote snapshot",
        "containerd.io/snapshot/firstbyte.image": digest("image"),
    }
    assert listing(directories) == set()
    assert images.retained == {(digest("image"), 1): 1, (digest("image"), 2): 1}


async def test_a_container_on_a_lazy_image_has_one_lower_directory(
    snapshotter: Snapshotter, images: DirectoryImages, tmp_path: Path
) -> None:
    images.add("image", "a", "b", "c")
    top = await pull_lazily(snapshotter, "image", "a", "b", "c")
    mounts = await snapshotter.prepare("container", top, NO_LABELS)
    lower = await images.lower(digest("image"), 3)
    (lowerdir,) = (option for option in mounts[0].options if option.startswith("lowerdir="))
    assert lowerdir == f"lowerdir={lower}"
    with mounted(mounts, tmp_path / "c") as root:
        assert listing(root) == {"a", "b", "c"}
        (root / "new").write_text("new")
    assert await snapshotter.view("view", top, NO_LABELS) == (
        Mount("bind", str(lower), ("ro", "rbind")),
    )
    with mounted(await snapshotter.mounts("view"), tmp_path / "v") as root:
        assert listing(root) == {"a", "b", "c"}


async def test_ordinary_layers_lie_on_lazy_ones(
    snapshotter: Snapshotter, images: DirectoryImages, tmp_path: Path
) -> None:
    images.add("image", "a", "b")
    top = await pull_lazily(snapshotter, "image", "a", "b")
    await write_layer(snapshotter, "built", top, {"built": "1"}, tmp_path)
    with mounted(await snapshotter.prepare("container", "built", NO_LABELS), tmp_path / "c") as r:
        assert listing(r) == {"a", "b", "built"}
    with mounted(await snapshotter.view("view", "built", NO_LABELS), tmp_path / "v") as root:
        assert listing(root) == {"a", "b", "built"}


async def test_lazy_layers_lie_on_ordinary_ones(
    snapshotter: Snapshotter, images: DirectoryImages, tmp_path: Path
) -> None:
    images.add("image", "a", "b")
    await write_layer(snapshotter, "unpacked a", "", {"a": "1"}, tmp_path)
    labels = layer_labels("image", "b", "chain a b")
    with pytest.raises(AlreadyExistsError):
        await snapshotter.prepare("extract", "unpacked a", labels)
    mounts = await snapshotter.prepare("container", digest("chain a b"), NO_LABELS)
    with mounted(mounts, tmp_path / "c") as root:
        assert listing(root) == {"a", "b"}  # the lazy one shows all layers to its depth


async def test_images_share_lazy_layers_and_release_them_one_by_one(
    snapshotter: Snapshotter, images: DirectoryImages
) -> None:
    images.add("one", "a", "b")
    images.add("two", "a", "c")
    await pull_lazily(snapshotter, "one", "a", "b")
    await pull_lazily(snapshotter, "two", "a", "c")
    one, two = digest("one"), digest("two")
    assert images.retained == {(one, 1): 1, (one, 2): 1, (two, 2): 1}
    await snapshotter.remove(digest("chain a b"))
    await snapshotter.remove(digest("chain a c"))
    await snapshotter.remove(digest("chain a"))
    assert images.released == [(one, 2), (two, 2), (one, 1)]


async def test_pulling_again_finds_what_is_there(
    snapshotter: Snapshotter, images: DirectoryImages
) -> None:
    images.add("image", "a")
    assert await pull_lazily(snapshotter, "image", "a") == digest("chain a")
    assert await pull_lazily(snapshotter, "image", "a") == digest("chain a")
    assert images.retained == {(digest("image"), 1): 1}


async def test_many_pulls_at_once_make_one_snapshot(
    snapshotter: Snapshotter, images: DirectoryImages
) -> None:
    images.add("image", "a")
    async with trio.open_nursery() as nursery:
        for _ in range(8):
            nursery.start_soon(pull_lazily, snapshotter, "image", "a")
    assert [info.name for info in await snapshotter.list([])] == [digest("chain a")]
    assert images.retained == {(digest("image"), 1): 1}


async def test_a_chain_on_another_parent_gets_another_name(
    snapshotter: Snapshotter, images: DirectoryImages, tmp_path: Path
) -> None:
    images.add("image", "a", "b")
    await pull_lazily(snapshotter, "image", "a", "b")
    await write_layer(snapshotter, "ns/1/a", "", {"a": "1"}, tmp_path)
    labels = layer_labels("image", "b", "chain a b")
    with pytest.raises(AlreadyExistsError):
        await snapshotter.prepare("ns/2/extract", "ns/1/a", labels)
    name = await find(snapshotter, digest("chain a b"), "ns/1/a")
    assert name == f"{digest('chain a b')} ns/2/extract"
    assert await find(snapshotter, digest("chain a b"), digest("chain a")) == digest("chain a b")


async def test_a_refused_image_is_unpacked_and_noted_down(
    snapshotter: Snapshotter, images: DirectoryImages, caplog: pytest.LogCaptureFixture
) -> None:
    images.add("image", "a", "b")
    images.refuse("image", "no-index", "nobody built a file index for it")
    labels = layer_labels("image", "a", "chain a")
    (mount,) = await snapshotter.prepare("extract a", "", labels)
    assert mount.type == "bind"
    await snapshotter.commit("ns/1/a", "extract a", labels, "")
    labels = layer_labels("image", "b", "chain b")
    (mount,) = await snapshotter.prepare("extract b", "ns/1/a", labels)
    assert mount.type == "overlay"
    (fallback,) = await snapshotter.fallbacks()
    assert (fallback.reference, fallback.kind, fallback.layers) == (
        "registry.example/image:1",
        "no-index",
        2,
    )
    (line,) = (record for record in caplog.records if record.levelname == "WARNING")
    assert "registry.example/image:1" in line.getMessage()
    assert "nobody built a file index for it" in line.getMessage()
    assert (await snapshotter.stats()).fallbacks == {"no-index": 2}


async def test_missing_image_labels_are_noted_down(
    snapshotter: Snapshotter, images: DirectoryImages
) -> None:
    labels = {"containerd.io/snapshot.ref": digest("chain a")}
    await snapshotter.prepare("extract a", "", labels)
    (fallback,) = await snapshotter.fallbacks()
    assert (fallback.kind, fallback.reference) == ("no-labels", "")
    assert "docs/containerd.md" in fallback.reason
    assert images.asked == []


async def test_a_container_is_no_fallback(
    snapshotter: Snapshotter, images: DirectoryImages
) -> None:
    images.add("image", "a")
    top = await pull_lazily(snapshotter, "image", "a")
    await snapshotter.prepare("container", top, {"containerd.io/snapshot/cri.image-ref": "x"})
    await snapshotter.view("view", top, NO_LABELS)
    assert await snapshotter.fallbacks() == []
    stats = await snapshotter.stats()
    assert (stats.lazy_layers, stats.ordinary_layers, stats.containers, stats.views) == (1, 0, 1, 1)
    assert stats.fallbacks == {}


async def test_the_network_is_not_asked_for_a_layer_whose_parent_is_missing(
    snapshotter: Snapshotter, images: DirectoryImages
) -> None:
    images.add("image", "a")
    with pytest.raises(NotFoundError):
        await snapshotter.prepare("extract", "nothing", layer_labels("image", "a", "chain"))
    assert images.asked == []


async def test_an_image_that_cannot_be_opened_is_unavailable(
    snapshotter: Snapshotter, images: DirectoryImages, directories: Path
) -> None:
    images.add("image", "a")
    top = await pull_lazily(snapshotter, "image", "a")
    await snapshotter.prepare("before", top, NO_LABELS)
    images.broken = "registry.example does not answer"
    for call in (
        snapshotter.prepare("container", top, NO_LABELS),
        snapshotter.view("container", top, NO_LABELS),
        snapshotter.mounts("before"),
    ):
        with pytest.raises(UnavailableError, match=r"does not answer: look at the network"):
            await call
    with pytest.raises(NotFoundError):
        await snapshotter.stat("container")
    assert len(listing(directories)) == 1


async def test_shared_lazy_content_is_counted_once(
    snapshotter: Snapshotter, images: DirectoryImages
) -> None:
    images.add("one", "a", "b")
    images.add("two", "x", "b")
    tops = [
        await pull_lazily(snapshotter, "one", "a", "b"),
        await pull_lazily(snapshotter, "two", "x", "b"),
    ]
    images.sizes = {content_key(digest("b")): 4096}
    assert [await snapshotter.usage(top) for top in tops] == [Usage(0, 4096), Usage(0, 0)]
    await snapshotter.remove(tops[0])
    assert await snapshotter.usage(tops[1]) == Usage(0, 4096)


async def test_a_successor_goes_on_where_it_was(
    snapshotter: Snapshotter, images: DirectoryImages, tmp_path: Path, directories: Path
) -> None:
    images.add("image", "a", "b")
    top = await pull_lazily(snapshotter, "image", "a", "b")
    before = await snapshotter.prepare("container", top, NO_LABELS)
    snapshotter.close()
    images.retained.clear()
    for left in ("new-1234", "gone-1234", "77", "stray"):
        (directories / left / "fs").mkdir(parents=True)
    successor = Snapshotter(tmp_path / "root", images, tmp_path / "idmapped")
    await successor.recover()
    assert images.retained == {(digest("image"), 1): 1, (digest("image"), 2): 1}
    assert await successor.mounts("container") == before
    assert len(listing(directories)) == 1
    successor.close()


async def test_lost_files_are_said_at_start(
    snapshotter: Snapshotter, directories: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (mount,) = await snapshotter.prepare("container", "", NO_LABELS)
    await trio.Path(mount.source).rmdir()
    await snapshotter.recover()
    assert "the files of snapshot container" in caplog.text
    assert (await snapshotter.stat("container")).kind is Kind.ACTIVE


async def test_a_release_that_fails_does_not_bring_the_snapshot_back(
    snapshotter: Snapshotter,
    images: DirectoryImages,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def release(image: str, depth: int) -> None:
        raise StoreError("the disk is on fire")

    monkeypatch.setattr(images, "release", release)
    images.add("image", "a")
    top = await pull_lazily(snapshotter, "image", "a")
    await snapshotter.remove(top)
    assert "the disk is on fire" in caplog.text
    with pytest.raises(NotFoundError):
        await snapshotter.stat(top)


async def test_an_image_is_released_although_the_caller_gave_up(
    snapshotter: Snapshotter, images: DirectoryImages
) -> None:
    images.add("image", "a")
    top = await pull_lazily(snapshotter, "image", "a")

    really = images.release
    with trio.CancelScope() as scope:

        async def release(image: str, depth: int) -> None:
            scope.cancel()
            await trio.lowlevel.checkpoint()
            await really(image, depth)

        images.release = release  # type: ignore[method-assign, assignment]
        await snapshotter.remove(top)
    assert images.released == [(digest("image"), 1)]


def test_nobody_else_can_look_into_it(tmp_path: Path, images: DirectoryImages) -> None:
    Snapshotter(tmp_path / "new" / "root", images, tmp_path / "idmapped").close()
    assert (tmp_path / "new" / "root" / "containerd").stat().st_mode & 0o7777 == 0o700


def test_a_root_that_overlay_cannot_name_is_refused_at_start(
    tmp_path: Path, images: DirectoryImages
) -> None:
    with pytest.raises(StoreError, match="cannot be used for overlay"):
        Snapshotter(tmp_path / "with,comma", images, tmp_path / "idmapped")
    assert not (tmp_path / "with,comma").exists()
