"""Images that go: what containerd forgets, what the disk gets back, and what others still need."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import grpc
import pytest

from tests.support.instance import wait_until
from tests.support.lazy_workloads import (
    KEPT,
    Snapshots,
    containerd_status,
    ctr_pull,
    lazy_layers,
    printed,
    tree_differences,
    wait_local,
    workload_node,
)
from tests.support.leaks import shown_in
from tests.support.shop import Shop, workshop
from tests.support.tars import directory, file, tar, whiteout

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager
    from pathlib import Path

    from tests.support.containerd import RunningContainerd
    from tests.support.lazy_node import LazyNode
    from tests.support.shop import PushedImage

pytestmark = pytest.mark.root

BIG = random.Random(2).randbytes(1_000_000)
MIDDLE = tar(directory(b"data"), file(b"data/big", BIG), file(b"data/name", b"middle"))


@pytest.fixture(scope="module")
def image(store: Shop) -> PushedImage:
    top = tar(file(b"data/name", b"top"), whiteout(b"data/big"))
    return store.put("image", [workshop(), MIDDLE, top], index=True)


@pytest.fixture(scope="module")
def sibling(store: Shop) -> PushedImage:
    """Has the lower two layers in common with `image`."""
    return store.put("sibling", [workshop(), MIDDLE, tar(file(b"sibling"))], index=True)


@pytest.fixture(scope="module")
def ordinary_sibling(store: Shop) -> PushedImage:
    """As `sibling`, but without a file index."""
    return store.put("ordinary", [workshop(), MIDDLE, tar(file(b"data/name", b"ordinary"))])


@pytest.fixture(scope="module", params=["1.6", "2.1"])
def node(
    request: pytest.FixtureRequest,
    run_containerd: Callable[..., AbstractContextManager[RunningContainerd]],
    store: Shop,
) -> Iterator[LazyNode]:
    with workload_node(run_containerd, request.param, "images = { build = false }") as made:
        store.let_in(made.containerd)
        yield made


@pytest.fixture(autouse=True)
def nothing_left(node: LazyNode) -> Iterator[None]:
    """Whatever a test does with images, their removal leaves nothing anywhere."""
    yield
    for image in node.cri.images():
        node.cri.remove_image(image.id)
    wait_until(lambda: _left(node) == set())
    status = containerd_status(node)
    assert (status.lazy_layers, status.ordinary_layers, status.containers, status.views) == (0,) * 4
    assert status.images == []
    assert shown_in(node.here) == []


def _left(node: LazyNode) -> set[Path]:
    """Files and directories of images and snapshots."""
    places = ("layers", "indexes", "images", "containerd/snapshots")
    return {path for place in places for path in (node.here.root / place).iterdir()}


def test_an_image_is_removed_and_pulled_again(node: LazyNode, image: PushedImage) -> None:
    for _ in range(2):
        node.cri.pull(image.reference)
        assert lazy_layers(node.containerd, image) == [True] * 3
        wait_local(node, image)
        assert printed(node, image, "cat /data/name") == "top"
        node.cri.remove_image(image.reference)
        with Snapshots(node.containerd, "firstbyte") as snapshots, pytest.raises(grpc.RpcError):
            snapshots.stat(image.chains[0])


def test_layers_stay_while_another_image_has_them(
    node: LazyNode, store: Shop, image: PushedImage, sibling: PushedImage
) -> None:
    for pulled in (image, sibling):
        node.cri.pull(pulled.reference)
        wait_local(node, pulled)
    store.forget_requests()
    node.cri.remove_image(image.reference)
    assert lazy_layers(node.containerd, sibling) == [True] * 3
    assert printed(node, sibling, "cat /data/name; cat /data/big | wc -c") == f"middle{len(BIG)}\n"
    assert store.asked_by_us() == []


def test_layers_go_that_no_other_image_has(
    node: LazyNode, image: PushedImage, sibling: PushedImage
) -> None:
    """The lower layers belong to the image that was pulled first, and the other one needs them."""
    for pulled in (image, sibling):
        node.cri.pull(pulled.reference)
        wait_local(node, pulled)
    layers = node.here.root / "layers"
    before = len(list(layers.iterdir()))
    node.cri.remove_image(image.reference)
    assert len(list(layers.iterdir())) == before - 1


def test_lower_layers_outlive_the_image_they_came_with(
    node: LazyNode, image: PushedImage, ordinary_sibling: PushedImage
) -> None:
    """An image that has no file index stands on layers of one that has, and stays when it goes."""
    node.cri.pull(image.reference)
    node.cri.pull(ordinary_sibling.reference)
    assert lazy_layers(node.containerd, ordinary_sibling) == [True, True, False]
    _assert_as_on_overlayfs(node, ordinary_sibling)
    node.cri.remove_image(image.reference)
    _assert_as_on_overlayfs(node, ordinary_sibling)
    assert printed(node, ordinary_sibling, "cat /data/name") == "ordinary"


def test_a_lazy_layer_on_ordinary_ones(
    node: LazyNode, image: PushedImage, ordinary_sibling: PushedImage
) -> None:
    """The other way round: what is lazy covers what was unpacked before."""
    node.cri.pull(ordinary_sibling.reference)
    node.cri.pull(image.reference)
    assert lazy_layers(node.containerd, image) == [False, False, True]
    _assert_as_on_overlayfs(node, image)
    node.cri.remove_image(ordinary_sibling.reference)
    _assert_as_on_overlayfs(node, image)
    assert printed(node, image, "cat /data/name; ls /data") == "topname\n"


def _assert_as_on_overlayfs(node: LazyNode, image: PushedImage) -> None:
    ctr_pull(node.containerd, image, "overlayfs")
    trees = []
    for snapshotter in ("firstbyte", "overlayfs"):
        with Snapshots(node.containerd, snapshotter) as snapshots:
            trees.append(snapshots.tree(image.chains[-1]))
    assert not tree_differences(*trees)


def test_an_image_that_a_container_runs_on(node: LazyNode, image: PushedImage) -> None:
    """The image's name goes; what the container needs stays until it goes."""
    node.cri.pull(image.reference)
    with node.cri.pod() as pod:
        container = pod.start(image.reference)
        node.cri.remove_image(image.reference)
        assert node.cri.image(image.reference) is None
        done = container.execute("sh", "-c", "cat /data/name; echo new >/new; cat /new; ls /bin")
        assert done.stdout.startswith("topnew\n")
        assert "sleep" in done.stdout


def test_usage_is_what_is_on_the_disk(node: LazyNode, image: PushedImage) -> None:
    node.cri.pull(image.reference)
    wait_local(node, image)
    layers = node.here.root / "layers"
    with Snapshots(node.containerd, "firstbyte") as snapshots:
        used = [snapshots.usage(chain).size for chain in image.chains]
        blocks = sum(path.stat().st_blocks for path in layers.rglob("*") if path.is_file())
        assert used[1] >= len(BIG)
        assert used[2] < used[1] < used[0]

        mounts = snapshots.prepare("container", image.chains[-1], KEPT)
        empty = snapshots.usage("container")
        with snapshots.shown(mounts) as place:
            (place / "new").write_bytes(BIG)
            (place / "data" / "name").write_text("copied up")
        full = snapshots.usage("container")
        assert full.size - empty.size >= len(BIG)
        assert full.inodes - empty.inodes == 3  # new, data, data/name
        snapshots.remove("container")
    assert sum(used) == 512 * blocks
    total = node.containerd.ctr("snapshots", "--snapshotter", "firstbyte", "usage", image.chains[1])
    assert image.chains[1] in total
