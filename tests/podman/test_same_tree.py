"""Containers of both stores show the tree that an ordinary unpack gives."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest

from tests.support.awkward import TIMELESS, awkward_layers
from tests.support.instance import greeter
from tests.support.layouts import write_layout
from tests.support.podman import Podman, podman
from tests.support.trees import Item, differences, read_tree

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.instance import Instance
    from tests.support.registry import RunningRegistry

pytestmark = pytest.mark.root

IMAGES = os.environ.get("FIRSTBYTE_PODMAN_IMAGES", "").split()
"""More images, each an oci:PATH:TAG, such as `firstbyte bench` makes in its cache."""


class Unpacked(NamedTuple):
    """An image, and what it is as one tree; and as layers: overlayfs counts the links of a file as
    the layer does that brought it."""

    reference: str
    merged: dict[bytes, Item]
    stacked: dict[bytes, Item]


def unpack(image: str, reference: str, folder: Path) -> dict[bytes, Item]:
    """Push an image, an oci:PATH:TAG, and unpack it in the ordinary way."""
    copy = ("skopeo", "copy", "-q", "--dest-tls-verify=false", image, f"docker://{reference}")
    subprocess.run(copy, check=True)
    command = ["umoci", "unpack", "--image", image.removeprefix("oci:"), folder / "bundle"]
    subprocess.run(command, check=True, capture_output=True)
    tree = read_tree(folder / "bundle/rootfs", timeless=TIMELESS)
    shutil.rmtree(folder / "bundle")
    return tree


@pytest.fixture(scope="module")
def awkward(registry: RunningRegistry, tmp_path_factory: pytest.TempPathFactory) -> Unpacked:
    """podman 4.3 itself cannot unpack these layers."""
    folder, reference = tmp_path_factory.mktemp("awkward"), registry.reference("awkward")
    write_layout(folder / "layout", awkward_layers())
    merged = unpack(f"oci:{folder}/layout:latest", reference, folder)
    more = {
        path: replace(merged[path], nlink=(merged[path].nlink or 0) + 1)
        for path in (b"/links/outside", b"/links/two", b"/links/three")
    }
    return Unpacked(reference, merged, merged | more)


@pytest.fixture(scope="module")
def unpacked(
    awkward: Unpacked, registry: RunningRegistry, tmp_path_factory: pytest.TempPathFactory
) -> list[Unpacked]:
    """The awkward image, and those that are asked for."""
    found = [awkward]
    for number, image in enumerate(IMAGES):
        reference = registry.reference(f"asked-for-{number}")
        tree = unpack(image, reference, tmp_path_factory.mktemp("asked-for"))
        found.append(Unpacked(reference, tree, tree))
    return found


@pytest.fixture(scope="module")
def old(served: Instance, registry: RunningRegistry) -> Iterator[Podman]:
    """podman 4.3 with the layer store."""
    with podman("4.3", served.base / "p4", registry.host, [served.base]) as made:
        made.configure(additionallayerstores=[f"{served.root}/podman/layers:ref"])
        yield made
        made.reset()


def tree_in_a_container(version: Podman, image: str) -> dict[bytes, Item]:
    """But for the time of the root directory, which is podman's own."""
    version.succeed("create", "--name", "one", image, "/none")
    tree = read_tree(version.tree("one"), timeless=TIMELESS | {b""})
    version.succeed("rm", "-f", "one")
    return tree


def assert_same(tree: dict[bytes, Item], expected: dict[bytes, Item]) -> None:
    assert not (lines := differences(tree, expected)), "\n".join(lines)


def test_of_the_layer_store(old: Podman, awkward: Unpacked) -> None:
    old.succeed("pull", "-q", awkward.reference)
    layers = list((old.graph_root / "overlay").glob("*/diff"))
    assert [layer.is_symlink() for layer in layers] == [True] * len(awkward_layers())
    assert_same(tree_in_a_container(old, awkward.reference), awkward.stacked)
    mounted = Path(old.succeed("image", "mount", awkward.reference))
    assert_same(read_tree(mounted, timeless=TIMELESS), awkward.stacked)
    old.succeed("image", "umount", awkward.reference)
    old.succeed("rmi", awkward.reference)


@pytest.mark.parametrize("layers", [False, True], ids=["merged", "with its own layers"])
def test_of_the_image_store(
    here: Instance, any_podman: Podman, unpacked: list[Unpacked], layers: bool
) -> None:
    if not greeter(here.state):
        here.start()
    for image in unpacked:
        here.succeed("podman", "add", *(["--layers"] if layers else []), image.reference)
        tree = tree_in_a_container(any_podman, image.reference)
        assert_same(tree, image.stacked if layers else image.merged)
        here.succeed("podman", "rm", image.reference)
