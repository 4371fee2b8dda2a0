"""Layers that are here when the kernel's EROFS is mounted: it reads the store's files, not ours."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from snapshotter.mounts.table import mount_at
from tests.support.awkward import TIMELESS, awkward_layers
from tests.support.gateway import Gateway, gateway
from tests.support.images import digest
from tests.support.instance import Instance, firstbyte, wait_until
from tests.support.layouts import write_layout
from tests.support.registry import RunningRegistry, skopeo_push
from tests.support.tars import file, tar
from tests.support.trees import differences, read_tree

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.root

SIZE = 2 << 20
LOWER = random.Random(1).randbytes(SIZE)
UPPER = random.Random(2).randbytes(SIZE)
BASE = tar(file(b"lower", LOWER), file(b"lower-too", LOWER[::-1]))
TOP = tar(file(b"upper", UPPER))
IMAGES = {"base": [BASE], "app": [BASE, TOP], "awkward": awkward_layers()}


@pytest.fixture(scope="module")
def way(registry: RunningRegistry, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """To the images, which have indexes. Their blobs are plain tars: by their own digest."""
    for name, layers in IMAGES.items():
        layout = tmp_path_factory.mktemp(name) / "layout"
        write_layout(layout, layers, compress="none")
        skopeo_push(layout, registry.reference(name))
        firstbyte("index", "build", registry.reference(name), "--push")
    with gateway(registry.host) as made:
        yield made


def bring(node: Instance, way: Gateway, name: str) -> None:
    """Have all of an image in the store. Nobody has started it."""
    target = node.directory("brought")
    node.succeed("mount", way.reference(name), target, "--mode", "fuse", "--wait-local")
    node.succeed("umount", target)
    target.rmdir()


def raw_files(node: Instance) -> list[Path]:
    return [*node.root.glob("layers/*/raw")]


def collect(node: Instance) -> None:
    """Delete all layers. A process that compares trees may have them open for a moment more."""
    wait_until(lambda: bool(node.succeed("gc", "--all")) and not raw_files(node))


def start(node: Instance, image: str, *names: str) -> None:
    """Start an image, and read some of its files."""
    with node.mounted(image) as tree:
        for name in names:
            (tree / name).read_bytes()


def profile(node: Instance, way: Gateway) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(
        node.succeed("profile", "show", way.reference("app"), "--json")
    )
    return found


def touched(node: Instance, way: Gateway) -> set[tuple[int, int]]:
    return {(touch["layer"], touch["chunk"]) for touch in profile(node, way)["touches"]}


def why(node: Instance) -> str:
    (shown,) = node.status()["mounts"]
    return f"{shown['mode']}: {shown['why']}"


FROM_DISK = "erofs: not all of it is on this node yet; 1 of 2 layers come from the disk"


@contextmanager
def partly_local(node: Instance, way: Gateway) -> Iterator[Path]:
    """`app`, whose start is known, with its base on the node and nothing of its top layer: that
    does not come before the end of the block."""
    start(node, way.reference("app"), "lower", "upper")
    collect(node)
    bring(node, way, "base")
    target = node.directory("app")
    with way.held_at(f"/blobs/{digest(TOP)}".encode()):
        node.succeed("mount", way.reference("app"), target)
        yield target


def forget(node: Instance, descriptor: int) -> None:
    """Have the kernel drop the data of a file, and of all raw spaces in the store."""
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    for raw in raw_files(node):
        with raw.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@pytest.mark.parametrize("sent", [signal.SIGSTOP, signal.SIGKILL])
def test_reads_of_a_layer_that_is_here_need_no_daemon(
    here: Instance, way: Gateway, sent: signal.Signals
) -> None:
    """And those of one that is not wait, for the same daemon or the next."""
    daemon = here.start()
    with ExitStack() as stack:
        with partly_local(here, way) as tree:
            assert why(here) == FROM_DISK
            lower = os.open(tree / "lower", os.O_RDONLY)
            stack.callback(os.close, lower)
            os.pread(lower, 1, 0)  # so that the kernel has where in the layer it is
            command = ["cat", str(tree / "upper")]
            reader = stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE))
            stack.callback(reader.kill)
            daemon.send_signal(sent)
            forget(here, lower)
            assert os.pread(lower, SIZE, 0) == LOWER
            if sent == signal.SIGKILL:
                daemon.wait()
                daemon = here.start()
                forget(here, lower)
                assert os.pread(lower, SIZE, 0) == LOWER
            assert reader.poll() is None
        daemon.send_signal(signal.SIGCONT)
        assert reader.communicate(timeout=30)[0] == UPPER
    assert (tree / "lower-too").read_bytes() == LOWER[::-1]
    here.succeed("umount", tree)


def test_a_start_whose_profile_is_not_known_is_seen_as_a_whole(
    here: Instance, way: Gateway
) -> None:
    """Or the profile would lack what was local here, and is not on the next node."""
    bring(here, way, "base")
    with here.mounted(way.reference("app")) as tree:
        assert (tree / "lower").read_bytes() == LOWER
        assert (tree / "upper").read_bytes() == UPPER
    assert {layer for layer, _ in touched(here, way)} == {0, 1}


def test_a_start_that_is_not_seen_as_a_whole_changes_no_profile(
    here: Instance, way: Gateway
) -> None:
    """And nothing of what the kernel reads goes, before it is unmounted."""
    here.start()
    with partly_local(here, way) as tree:
        known = profile(here, way)
        assert why(here) == FROM_DISK
        here.succeed("gc", "--all")
        assert BASE in [raw.read_bytes() for raw in raw_files(here)]
        assert (tree / "lower-too").read_bytes() == LOWER[::-1]
    assert (tree / "upper").read_bytes() == UPPER
    here.succeed("umount", tree)
    assert profile(here, way) == known
    collect(here)


def test_a_pack_makes_a_start_known_too(
    here: Instance, way: Gateway, registry: RunningRegistry, tmp_path: Path
) -> None:
    """The first one on a node that has the base of another image."""
    write_layout(tmp_path / "packed", [BASE, TOP], compress="none")
    skopeo_push(tmp_path / "packed", registry.reference("packed"))
    start(here, registry.reference("packed"), "lower", "upper")
    here.succeed("index", "build", registry.reference("packed"), "--profile-from-node", "--push")
    here.start()
    here.succeed("profile", "rm", registry.reference("packed"))
    collect(here)
    bring(here, way, "base")
    target = here.directory("packed")
    with way.held_at(f"/blobs/{digest(TOP)}".encode()):
        here.succeed("mount", way.reference("packed"), target)
        assert why(here) == FROM_DISK
    here.succeed("umount", target)


def test_the_tree_is_the_same(here: Instance, way: Gateway) -> None:
    """Of an image that is local, all but the tree comes from the disk, and past its page cache."""
    bring(here, way, "awkward")
    trees = [here.directory(mode) for mode in ("fuse", "erofs")]
    for tree in trees:
        here.succeed("mount", way.reference("awkward"), tree, "--mode", tree.name)
    count = len(IMAGES["awkward"])
    assert f"{count} of {count} layers come from the disk" in here.log()
    mounted = mount_at(trees[1])
    assert mounted is not None
    assert b"directio" in mounted.super_options
    first, second = (read_tree(tree, timeless=TIMELESS) for tree in trees)
    assert not (lines := differences(first, second)), "\n".join(lines)
    for tree in trees:
        here.succeed("umount", tree)
