"""Containers of both stores show the tree that an ordinary unpack gives."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest

from tests.support.awkward import TIMELESS, awkward_layers
from tests.support.layouts import write_layout
from tests.support.podman import Podman, podman
from tests.support.registry import RunningRegistry, skopeo_push
from tests.support.trees import Item, differences, read_tree

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.instance import Instance

pytestmark = pytest.mark.root


class Awkward(NamedTuple):
    """An image, and the tree that umoci unpacks; podman 4.3 itself cannot unpack these layers."""

    reference: str
    unpacked: dict[bytes, Item]

    @property
    def stacked(self) -> dict[bytes, Item]:
        """Overlayfs counts the links of a file as the layer does that brought it."""
        items = dict(self.unpacked)
        for path in (b"/links/outside", b"/links/two", b"/links/three"):
            items[path] = replace(items[path], nlink=(items[path].nlink or 0) + 1)
        return items


@pytest.fixture(scope="module")
def awkward(registry: RunningRegistry, tmp_path_factory: pytest.TempPathFactory) -> Awkward:
    folder = tmp_path_factory.mktemp("awkward")
    write_layout(folder / "layout", awkward_layers())
    reference = registry.reference("awkward")
    skopeo_push(folder / "layout", reference)
    subprocess.run(
        ["umoci", "unpack", "--image", f"{folder}/layout:latest", str(folder / "bundle")],
        check=True,
        capture_output=True,
    )
    return Awkward(reference, read_tree(folder / "bundle/rootfs", timeless=TIMELESS))


@pytest.fixture(scope="module")
def old(served: Instance, registry: RunningRegistry) -> Iterator[Podman]:
    """podman 4.3 with both stores."""
    with podman("4.3", served.base / "p4", registry.host, [served.base]) as made:
        made.configure(
            additionalimagestores=[served.root / "podman/images"],
            additionallayerstores=[f"{served.root}/podman/layers:ref"],
        )
        yield made
        made.reset()


def assert_same_in_a_container(old: Podman, image: str, expected: dict[bytes, Item]) -> None:
    """But for the time of the root directory, which is podman's own."""
    old.succeed("create", "--name", "one", image, "/none")
    tree = read_tree(Path(old.succeed("mount", "one")), timeless=TIMELESS | {b""})
    old.succeed("rm", "-f", "one")
    assert not (lines := differences(tree, expected)), "\n".join(lines)


def test_of_the_layer_store(served: Instance, old: Podman, awkward: Awkward) -> None:
    old.succeed("pull", "-q", awkward.reference)
    layers = list((old.graph_root / "overlay").glob("*/diff"))
    assert [layer.is_symlink() for layer in layers] == [True] * len(awkward_layers())
    assert_same_in_a_container(old, awkward.reference, awkward.stacked)
    mounted = Path(old.succeed("image", "mount", awkward.reference))
    tree = read_tree(mounted, timeless=TIMELESS)
    assert not (lines := differences(tree, awkward.stacked)), "\n".join(lines)
    old.succeed("image", "umount", awkward.reference)
    old.succeed("rmi", awkward.reference)


@pytest.mark.parametrize("layers", [False, True], ids=["merged", "with its own layers"])
def test_of_the_image_store(served: Instance, old: Podman, awkward: Awkward, layers: bool) -> None:
    served.succeed("podman", "add", *(["--layers"] if layers else []), awkward.reference)
    expected = awkward.stacked if layers else awkward.unpacked
    assert_same_in_a_container(old, awkward.reference, expected)
    served.succeed("podman", "rm", awkward.reference)
