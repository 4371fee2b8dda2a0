"""What containers write on lazy images, and images that are made of it.

Everything is done twice, on FirstByte and on containerd's overlayfs, and must give the same.
"""

from __future__ import annotations

import gzip
import io
import shutil
import tarfile
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import pytest

from tests.support.lazy_workloads import (
    Snapshots,
    ctr_diff,
    ctr_pull,
    ctr_run,
    lazy_layers,
    tree_differences,
    usual_namespace,
    workload_node,
)
from tests.support.shop import Shop, packed, workshop
from tests.support.tars import CAPABILITY, directory, file, hardlink, symlink, tar, whiteout
from tests.support.trees import Item, read_tree

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from contextlib import AbstractContextManager
    from pathlib import Path

    from tests.support.containerd import RunningContainerd
    from tests.support.lazy_node import LazyNode
    from tests.support.lazy_workloads import Snapshotter
    from tests.support.shop import PushedImage

pytestmark = pytest.mark.root

LOWER = tar(
    directory(b"data"),
    *(file(b"data/" + name, b"lower " + name + b"\n") for name in (b"kept", b"gone", b"replaced")),
    *(file(b"data/" + name, b"0123456789") for name in (b"appended", b"cut", b"overwritten")),
    *(file(b"data/" + name, b"owned", uid=7, gid=8) for name in (b"chmod", b"chown", b"xattr")),
    file(b"data/renamed", b"renamed"),
    file(b"data/linked", b"linked"),
    file(b"data/one", b"two names"),
    hardlink(b"data/two", b"data/one"),
    symlink(b"data/symlink", b"kept"),
    directory(b"data/tree"),
    directory(b"data/tree/deep"),
    file(b"data/tree/deep/file", b"deep"),
    directory(b"data/removed"),
    file(b"data/removed/file", b"removed"),
    directory(b"data/reborn"),
    file(b"data/reborn/lower", b"lower"),
    directory(b"data/opened", mode=0o700),
    file(b"data/big", bytes(range(256)) * 4096),
)
UPPER = tar(
    file(b"data/kept", b"upper kept\n"),
    whiteout(b"data/gone"),
    file(b"data/tree/upper", b"upper"),
)

CHANGES = f"""
set -e
cd /data
rm replaced; echo again >replaced; echo back >gone
printf more >>appended; truncate -s 4 cut; printf XY | dd of=overwritten bs=1 seek=3 conv=notrunc
chmod 4711 chmod; chown 1234:77 chown; chmod 755 opened
setfattr -n security.capability -v 0x{CAPABILITY.hex()} overwritten
setfattr -n user.note -v text xattr; setfattr -n user.tree -v text tree
mv renamed moved; ln linked also-linked; printf changed >>one; ln -s /data/kept new-symlink
mv tree/deep deep; mv kept tree/kept; rm -r removed; rm symlink
rm -r reborn; mkdir reborn; echo upper >reborn/upper
mkdir -p new/directory; echo file >new/directory/file; chmod 1777 new
mkfifo fifo; mknod device c 1 3
truncate -s 1M sparse; printf end >>sparse
printf hole | dd of=big bs=1 seek=600000 conv=notrunc
rm /etc/group; mv /home /houses; ln /bin/cat /bin/cat2
"""


@pytest.fixture(scope="module")
def image(store: Shop) -> PushedImage:
    return store.put("image", [workshop(), LOWER, UPPER], index=True)


@pytest.fixture(scope="module", params=["1.6", "2.1"])
def node(
    request: pytest.FixtureRequest,
    run_containerd: Callable[..., AbstractContextManager[RunningContainerd]],
    store: Shop,
    image: PushedImage,
) -> Iterator[LazyNode]:
    """A node that has the image twice: lazily, and as overlayfs has it."""
    with workload_node(run_containerd, request.param) as made:
        store.let_in(made.containerd)
        made.cri.pull(image.reference)
        ctr_pull(made.containerd, image, "overlayfs")
        assert lazy_layers(made.containerd, image) == [True] * 3
        yield made


def test_changes_and_an_image_of_them(node: LazyNode, store: Shop, image: PushedImage) -> None:
    """All that people do to files: the changed container, the layer, and an image that has it."""
    lazy = _change(node, image, "firstbyte")
    plain = _change(node, image, "overlayfs")
    assert_same(lazy.tree, plain.tree)
    assert b"/data/moved" in lazy.tree
    members = _members(lazy.layer)
    assert members == _members(plain.layer)
    assert members["data/overwritten"][-2]
    assert {"data/.wh.removed", "data/reborn/.wh.lower"} <= members.keys()

    name = f"committed-{node.containerd.version}"
    committed = store.put(name, [workshop(), LOWER, UPPER, packed(lazy.layer)])
    node.cri.pull(committed.reference)
    ctr_pull(node.containerd, committed, "overlayfs")
    assert lazy_layers(node.containerd, committed) == [True] * 4
    trees = [_tree(node, committed.chains[-1], each) for each in ("firstbyte", "overlayfs")]
    assert_same(*trees)
    # containerd keeps no other attributes than capabilities in a layer.
    assert_same(trees[0], {path: _without_notes(item) for path, item in lazy.tree.items()})


@dataclass(frozen=True, slots=True)
class Changed:
    """A container after CHANGES, and the layer of them (an uncompressed tar)."""

    tree: dict[bytes, Item]
    layer: bytes


def _change(node: LazyNode, image: PushedImage, snapshotter: Snapshotter) -> Changed:
    name = f"changed-{snapshotter}"
    ctr_run(node.containerd, image, snapshotter, "--", "/bin/sh", "-c", CHANGES, name=name)
    with Snapshots(node.containerd, snapshotter) as snapshots:
        with snapshots.shown(snapshots.mounts(name)) as place:
            tree = read_tree(place)
        layer = gzip.decompress(ctr_diff(node.containerd, snapshotter, name))
    node.containerd.ctr("containers", "rm", name, namespace=usual_namespace(snapshotter))
    return Changed(tree, layer)


def _members(layer: bytes) -> dict[str, tuple[object, ...]]:
    """What a layer says of each name, but for times."""
    with tarfile.open(fileobj=io.BytesIO(layer)) as archive:
        return {
            member.name: (
                *(member.type, member.mode, member.uid, member.gid, member.linkname),
                *(member.devmajor, member.devminor),
                {key: text for key, text in member.pax_headers.items() if "xattr" in key},
                _content(archive, member),
            )
            for member in archive
        }


def _without_notes(item: Item) -> Item:
    kept = tuple((name, value) for name, value in item.xattrs if not name.startswith(b"user."))
    return replace(item, xattrs=kept)


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member) if member.isreg() else None
    return file.read() if file else b""


def _tree(node: LazyNode, chain: str, snapshotter: Snapshotter) -> dict[bytes, Item]:
    with Snapshots(node.containerd, snapshotter) as snapshots:
        return snapshots.tree(chain)


def assert_same(found: Mapping[bytes, Item], expected: Mapping[bytes, Item]) -> None:
    lines = tree_differences(found, expected)
    assert not lines, "\n".join(lines)


# --- layers of the node's own, as builds make them ---


def _edit(place: Path) -> None:
    """A step of a build, which works on any number of the image's layers."""
    data = place / "data"
    data.mkdir(exist_ok=True)
    (data / "kept").write_text("built")
    (data / "gone").unlink(missing_ok=True)
    if (data / "tree").exists():
        shutil.move(data / "tree", data / "felled")
    shutil.rmtree(data / "reborn", ignore_errors=True)
    with (data / "big").open("ab") as big:
        big.write(b"longer")
    (place / "bin" / "sleep").unlink()


def _edit_again(place: Path) -> None:
    (place / "data" / "kept").unlink()
    (place / "data" / "reborn").mkdir()
    (place / "data" / "reborn" / "built").touch()


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_build_on_some_of_its_layers(node: LazyNode, image: PushedImage, depth: int) -> None:
    """A build's cache keeps snapshots of each step, so it goes on from any of them."""
    trees = []
    for snapshotter in ("firstbyte", "overlayfs"):
        with Snapshots(node.containerd, snapshotter) as snapshots:
            snapshots.build("step 1", image.chains[depth - 1], _edit)
            snapshots.build("step 2", "step 1", _edit_again)
            trees.append((snapshots.tree("step 1"), snapshots.tree("step 2")))
            for name in ("step 2", "step 1"):
                snapshots.remove(name)
    (first, second), (plain_first, plain_second) = trees
    assert_same(first, plain_first)
    assert_same(second, plain_second)
    assert b"/data/kept" in first.keys() - second.keys()
