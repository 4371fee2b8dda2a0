"""Snapshots of lazy images, which are served from directories, with real overlay mounts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import trio

from snapshotter.containerd.errors import (
    AlreadyExistsError,
    NotFoundError,
    UnavailableError,
)
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
from tests.support.unpacking import find, pull_lazily, write_layer

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


pytestmark = pytest.mark.root

NO_LABELS: Mapping[str, str] = {}


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
