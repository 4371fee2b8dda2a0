"""Containers on lazy images: what they see, what they share, and what they cannot do."""

from __future__ import annotations

import stat
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from tests.support.awkward import awkward_layers
from tests.support.lazy_workloads import (
    Snapshots,
    ctr_pull,
    ctr_run,
    lazy_layers,
    tree_differences,
    workload_node,
)
from tests.support.shop import Shop, workshop
from tests.support.tars import directory, file, tar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from tests.support.containerd import RunningContainerd
    from tests.support.lazy_node import LazyNode
    from tests.support.shop import PushedImage
    from tests.support.trees import Item

pytestmark = pytest.mark.root


@pytest.fixture(scope="module")
def image(store: Shop) -> PushedImage:
    layers = [workshop(), tar(directory(b"data"), file(b"data/name", b"lazy\n"))]
    return store.put("image", layers, index=True)


@pytest.fixture(scope="module", params=["1.6", "2.1"])
def node(
    request: pytest.FixtureRequest,
    run_containerd: Callable[..., AbstractContextManager[RunningContainerd]],
    store: Shop,
    image: PushedImage,
) -> Iterator[LazyNode]:
    with workload_node(run_containerd, request.param) as made:
        store.let_in(made.containerd)
        made.cri.pull(image.reference)
        assert lazy_layers(made.containerd, image) == [True, True]
        yield made


def test_two_containers_share_the_image_and_nothing_else(
    node: LazyNode, image: PushedImage
) -> None:
    with node.cri.pod() as pod:
        one, two = pod.start(image.reference), pod.start(image.reference)
        done = one.execute("sh", "-c", "cat /data/name; echo mine >/data/name; rm -r /home")
        assert (done.stdout, done.stderr, done.exit_code) == ("lazy\n", "", 0)
        assert two.execute("sh", "-c", "cat /data/name; ls /home").stdout == "lazy\napp\n"
        one.stop()
        assert two.execute("cat", "/data/name").stdout == "lazy\n"
        assert one.status().state == "exited"


def test_what_a_container_prints_and_how_it_ends(node: LazyNode, image: PushedImage) -> None:
    with node.cri.pod() as pod:
        container = pod.start(image.reference, "/bin/sh", "-c", "cat /data/name; ls /none; exit 3")
        assert container.wait().exit_code == 3
        # Output and errors come through two pipes, in either order.
        errors, output = sorted(container.output().splitlines(), reverse=True)
        assert output == "lazy"
        assert errors.startswith("ls: ")
        assert "/none" in errors


def test_a_read_only_root(node: LazyNode, image: PushedImage) -> None:
    script = "cat /data/name; echo x >/data/new || echo refused"
    run = ("--read-only", "--", "/bin/sh", "-c", script)
    assert ctr_run(node.containerd, image, "firstbyte", *run) == "lazy\nrefused\n"


# --- the same tree as without FirstByte ---

CONTAINERD_REFUSES = (
    # Its unpacker looks for what a hard link leads to in the same layer only, and for a whiteout
    # makes a device, which cannot be where the layer has a directory.
    *(b"links/deleted-other", b"links/from-above", b".wh.reborn-late"),
    b"no/such/.wh.parent",  # nobody can look at the device that hides nothing
)


def test_the_tree_is_what_containerd_unpacks(node: LazyNode, store: Shop) -> None:
    """Of the whole image and of each of its lower chains, with every awkward case."""
    layers = [_without(layer, CONTAINERD_REFUSES) for layer in awkward_layers()]
    image = store.put("awkward", layers, index=True)
    node.cri.pull(image.reference)
    ctr_pull(node.containerd, image, "overlayfs")
    with (
        Snapshots(node.containerd, "firstbyte") as lazy,
        Snapshots(node.containerd, "overlayfs") as plain,
    ):
        assert lazy.lazy_layers(image) == [True] * len(layers)
        for chain in image.chains:
            expected = _as_containerd(plain.tree(chain))
            assert tree_differences(_as_containerd(lazy.tree(chain)), expected) == []


def _without(layer: bytes, names: tuple[bytes, ...]) -> bytes:
    """An uncompressed layer without some of its members."""
    kept, at = [], 0
    while at < len(layer) and layer[at]:
        size = int(layer[at + 124 : at + 135], 8) if layer[at + 124] < 0x80 else 0
        end = at + 512 + -(-size // 512) * 512
        if layer[at : at + 100].rstrip(b"\0") not in names:
            kept.append(layer[at:end])
        at = end
    return b"".join(kept) + layer[at:]


def _as_containerd(tree: dict[bytes, Item]) -> dict[bytes, Item]:
    """A tree without what containerd's unpacker does in ways of its own."""
    found = {}
    for path, item in tree.items():
        # No time before 1970, no attributes trusted.*, and the umask for devices.
        mtime = None if item.mtime_ns is None else max(item.mtime_ns, 0)
        xattrs = tuple(pair for pair in item.xattrs if not pair[0].startswith(b"trusted."))
        device = stat.S_ISCHR(item.mode) or stat.S_ISBLK(item.mode)
        mode = item.mode & ~0o022 if device else item.mode
        found[path] = replace(item, mtime_ns=mtime, xattrs=xattrs, mode=mode)
    # A hard link gives its inode its own time.
    found[b"/twice-linked"] = replace(found[b"/twice-linked"], mtime_ns=None)
    # A directory that is deleted and made again in one layer keeps what it had.
    found.pop(b"/reborn/lower", None)
    return found
