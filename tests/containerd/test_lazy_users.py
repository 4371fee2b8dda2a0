"""Containers in user namespaces on lazy images: root inside is nobody outside."""

from __future__ import annotations

import os
import signal
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from snapshotter.containerd.labels import GID_MAPPING, UID_MAPPING
from tests.support.grpc_clients import SnapshotsClient
from tests.support.instance import WAIT_SECONDS, wait_until
from tests.support.lazy_images import mounted
from tests.support.lazy_workloads import (
    KEPT,
    LAZY,
    Snapshots,
    ctr_run,
    lazy_layers,
    reconfigured,
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
    name = f"mapped-{uuid.uuid4().hex}"  # names a cgroup, too
    command = ("--", "/bin/sh", "-c", SCRIPT)
    shown = ctr_run(node.containerd, image, "firstbyte", *options, *MAPS, *command, name=name)
    lines = [" ".join(line.split()) for line in shown.splitlines()]
    assert lines == PRINTED.splitlines()
    with Snapshots(node.containerd, "firstbyte") as snapshots:
        (mount,) = snapshots.mounts(name)
    (upper,) = (each[9:] for each in mount.options if each.startswith("upperdir="))
    for path, (uid, gid) in OUTSIDE.items():
        status = (Path(upper) / "data" / path).stat()
        assert (status.st_uid, status.st_gid) == (FIRST + uid, FIRST + gid)
    node.containerd.ctr("containers", "rm", name, namespace=LAZY)
    return {path.name for path in (Path(upper) / "data").iterdir()}


def test_containerd_gives_a_copy_of_the_image_other_owners(
    node: LazyNode, image: PushedImage
) -> None:
    """What it does if the snapshotter is not said to map ids."""
    _run(node, image)


def test_the_kernel_maps_ids(node: LazyNode, image: PushedImage) -> None:
    """With the capability that docs/containerd.md has: nothing but what is written is copied.

    containerd 1.6 knows no capabilities, and leaves it to every snapshotter that is given labels.
    """
    before = 'type = "snapshot"\n'
    with reconfigured(node.containerd, before, f'{before}capabilities = ["remap-ids"]\n'):
        assert _run(node, image, "--remap-labels") == {"new", "other", "secret", "made"}


def test_without_the_capability_ids_are_mapped_once(node: LazyNode, image: PushedImage) -> None:
    """containerd 2.1 makes the copy with other owners, and asks for the mapping all the same."""
    _run(node, image, "--remap-labels")


def test_a_successor_maps_as_well(node: LazyNode, image: PushedImage, tmp_path: Path) -> None:
    """It finds what is mounted, or makes it anew as all that an interrupted daemon takes down."""
    mapping = f"0:{FIRST}:65536"
    labels = {**KEPT, UID_MAPPING: mapping, GID_MAPPING: mapping}
    others = _idmapped(node)
    with Snapshots(node.containerd, "firstbyte") as snapshots:
        before = snapshots.prepare("lasting", image.chains[-1], labels)
    (made,) = _idmapped(node) - others
    for number in (signal.SIGTERM, signal.SIGKILL, signal.SIGINT):
        node.daemon.send_signal(number)
        node.daemon.wait(WAIT_SECONDS)
        assert (made in _idmapped(node)) == (number is not signal.SIGINT)
        node.daemon = node.here.start()
        socket = node.here.state / "firstbyte.sock"
        wait_until(socket.exists)
        # containerd itself would wait before it connects again.
        with SnapshotsClient(socket) as snapshotter:
            (key,) = (info.name for info in snapshotter.list() if info.name.endswith("/lasting"))
            assert snapshotter.mounts(key) == before
        with mounted(before, tmp_path / "container") as root:
            status = (root / "data" / "other").stat()
            assert (status.st_uid, status.st_gid) == (FIRST + 7, FIRST + 8)
            assert (root / "data" / "secret").read_text() == "secret\n"


def _idmapped(node: LazyNode) -> set[bytes]:
    folder = os.fsencode(node.here.state / "idmapped") + b"/"
    return {entry.point for entry in node.here.mounts() if entry.point.startswith(folder)}
