"""Containers in user namespaces on lazy images: root inside is nobody outside."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.lazy_workloads import (
    LAZY,
    Snapshots,
    ctr_run,
    lazy_layers,
    reconfigured,
    workload_node,
)
from tests.support.shop import Shop, shop, workshop
from tests.support.tars import directory, file, tar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from tests.support.containerd import RunningContainerd
    from tests.support.lazy_node import LazyNode
    from tests.support.shop import PushedImage

pytestmark = pytest.mark.root

FIRST = 100_000  # the host's id of the container's root
MAPS = ("--uidmap", f"0:{FIRST}:65536", "--gidmap", f"0:{FIRST}:65536")
LAYER = tar(
    directory(b"data", uid=7, gid=8),
    file(b"data/root", b"root's\n", mode=0o600),
    file(b"data/other", b"other's\n", uid=7, gid=8),
    file(b"data/secret", b"secret\n", mode=0o600, uid=7, gid=8),
)
SCRIPT = """
set -e
cat /proc/self/uid_map
cd /data
stat -c '%n %u:%g' root other . /bin/cat
cat root secret
echo new >new
echo more >>other
chown 1234:77 secret
mkdir made
stat -c '%n %u:%g' new other secret made
"""
PRINTED = f"""\
0 {FIRST} 65536
root 0:0
other 7:8
. 7:8
/bin/cat 0:0
root's
secret
new 0:0
other 7:8
secret 1234:77
made 0:0
"""
OUTSIDE = {"new": (0, 0), "other": (7, 8), "secret": (1234, 77), "made": (0, 0)}


@pytest.fixture(scope="module")
def store() -> Iterator[Shop]:
    with shop() as made:
        yield made


@pytest.fixture(scope="module")
def image(store: Shop) -> PushedImage:
    return store.put("image", [workshop(), LAYER], index=True)


@pytest.fixture(scope="module", params=["1.6", "2.1"])
def node(
    request: pytest.FixtureRequest,
    run_containerd: Callable[..., AbstractContextManager[RunningContainerd]],
    store: Shop,
    image: PushedImage,
) -> Iterator[LazyNode]:
    with workload_node(run_containerd, request.param) as made:
        for private in (made.containerd.base, made.containerd.state):
            private.chmod(0o711)  # as /run/containerd is, for containers' roots to find theirs
        store.let_in(made.containerd)
        made.cri.pull(image.reference)
        assert lazy_layers(made.containerd, image) == [True, True]
        yield made


def _run(node: LazyNode, image: PushedImage, *options: str) -> set[str]:
    """Run SCRIPT and look at what it left; returns all that is in the writable layer's /data."""
    command = ("--", "/bin/sh", "-c", SCRIPT)
    shown = ctr_run(node.containerd, image, "firstbyte", *options, *MAPS, *command, name="mapped")
    lines = [" ".join(line.split()) for line in shown.splitlines()]
    assert lines == PRINTED.splitlines()
    with Snapshots(node.containerd, "firstbyte") as snapshots:
        (mount,) = snapshots.mounts("mapped")
    (upper,) = (each[9:] for each in mount.options if each.startswith("upperdir="))
    for name, (uid, gid) in OUTSIDE.items():
        status = (Path(upper) / "data" / name).stat()
        assert (status.st_uid, status.st_gid) == (FIRST + uid, FIRST + gid)
    node.containerd.ctr("containers", "rm", "mapped", namespace=LAZY)
    return {path.name for path in (Path(upper) / "data").iterdir()}


def test_containerd_gives_a_copy_of_the_image_other_owners(
    node: LazyNode, image: PushedImage
) -> None:
    """What it does if the snapshotter is not said to map ids."""
    _run(node, image)


@pytest.mark.xfail(
    strict=True,
    reason="containerd 2.1 maps the directory that all lower directories have in common, without "
    "the mounts in it, to look up users; containerd 1.6 does not know the options uidmap, gidmap",
)
def test_the_kernel_maps_ids(node: LazyNode, image: PushedImage) -> None:
    """With the capability that docs/containerd.md has: nothing but what is written is copied."""
    before = 'type = "snapshot"\n'
    with reconfigured(node.containerd, before, f'{before}capabilities = ["remap-ids"]\n'):
        assert _run(node, image, "--remap-labels") == {"new", "other", "secret", "made"}
