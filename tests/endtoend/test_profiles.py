"""Starts are recorded by themselves, and what was recorded can be seen, moved and published."""

from __future__ import annotations

import json
import random
import shutil
from typing import TYPE_CHECKING, Any

import pytest

from index.file import FileIndex
from index.pack import PackDecoder, read_table
from index.tables import CHUNK_SIZE
from tests.support.instance import firstbyte, instance
from tests.support.layouts import write_layout
from tests.support.registry import skopeo_push
from tests.support.tars import file, tar

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.support.instance import Instance
    from tests.support.registry import RunningRegistry

SIZE = 2 * CHUNK_SIZE
NAMES = [f"f{number}" for number in range(10)]
STARTED = ("f7", "f2", "f5")
"""What a start of the image reads, in order. Files of two chunks each lie one behind the other."""


def content(name: str, seed: int = 0) -> bytes:
    return random.Random(f"{seed} {name}").randbytes(SIZE)


BASE = tar(*(file(name.encode(), content(name)) for name in NAMES))


@pytest.fixture
def image(tmp_path: Path, registry: RunningRegistry) -> str:
    """An image of one layer with an index, in a repository of the test's own."""
    write_layout(tmp_path / "layout", [BASE])
    reference = registry.reference(tmp_path.name.replace("_", "-"))
    skopeo_push(tmp_path / "layout", reference)
    firstbyte("index", "build", reference, "--push")
    return reference


@pytest.fixture
def elsewhere() -> Iterator[Instance]:
    """Another node."""
    with instance() as made:
        yield made


def start(node: Instance, image: str, names: tuple[str, ...] = STARTED) -> None:
    with node.mounted(image) as tree:
        for name in names:
            assert (tree / name).read_bytes() == content(name)


def shown(node: Instance, what: str | Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(node.succeed("profile", "show", what, "--json"))
    return found


def files_of(profile: dict[str, Any]) -> list[str]:
    """The files of a profile, in the order in which they were touched first."""
    return list(dict.fromkeys(name for touch in profile["touches"] for name in touch["files"]))


@pytest.mark.parametrize("mode", ["fuse", "auto"])
def test_a_start_is_recorded_in_the_order_of_its_reads(
    here: Instance, image: str, mode: str
) -> None:
    here.mode = mode
    start(here, image)
    profile = shown(here, image)
    assert profile["runs"] == 1
    assert profile["from"] == "recorded on this node"
    read = [name for name in files_of(profile) if name.removeprefix("/") in STARTED]
    assert read == [f"/{name}" for name in STARTED]
    # A file lies in three chunks, and the kernel reads up to 1 MiB ahead of each.
    assert len(profile["touches"]) <= 7 * len(STARTED)
    table = here.succeed("profile", "show", image)
    assert "KiB" in table
    assert "/f7" in table


def forget_data(node: Instance) -> None:
    """Delete what a node without a daemon has of layers; it still knows the image."""
    shutil.rmtree(node.root / "layers")


def test_runs_are_merged(here: Instance, image: str) -> None:
    start(here, image)
    forget_data(here)
    start(here, image, ("f7", "f9"))
    profile = shown(here, image)
    assert profile["runs"] == 2
    assert {"/f7", "/f2", "/f5", "/f9"} <= {*files_of(profile)}
    (listed,) = here.succeed("profile", "ls", "--json").splitlines()
    assert json.loads(listed)["image"] == image


def test_a_mounted_directory_names_its_image(here: Instance, image: str) -> None:
    start(here, image)
    with here.mounted(image) as tree:
        assert shown(here, tree)["image"] == image
    assert "this node has no startup profile" in here.fail("profile", "show", here.base)


def test_a_profile_is_replayed_from_the_layers(here: Instance, image: str) -> None:
    start(here, image)
    forget_data(here)
    with here.mounted(image):
        fetched = here.status()["fetched"]
    assert fetched["startup"]["requests"] > 0
    assert fetched["blocked"]["requests"] == 0


def test_images_that_share_a_layer_each_have_what_their_starts_read(
    here: Instance, image: str, tmp_path: Path, registry: RunningRegistry
) -> None:
    """The kernel reads one flat file for both: its reads are noted for whoever is starting."""
    top = tar(file(b"top", b"small"))
    write_layout(tmp_path / "other", [BASE, top])
    other = registry.reference(tmp_path.name.replace("_", "-") + "-other")
    skopeo_push(tmp_path / "other", other)
    firstbyte("index", "build", other, "--push")
    tree = here.directory("first")
    here.succeed("mount", image, tree)
    start(here, other, ("f3",))
    here.succeed("umount", tree)
    assert "/f3" in files_of(shown(here, other))


def test_exported_pushed_found_elsewhere_and_forgotten(
    here: Instance, elsewhere: Instance, image: str, tmp_path: Path
) -> None:
    assert "has no startup profile" in elsewhere.fail("profile", "push", image)
    start(here, image)
    here.succeed("profile", "export", image, "-o", tmp_path / "app.json")
    assert files_of(shown(here, image))
    exported = shown(elsewhere, tmp_path / "app.json")
    assert exported["from"] == "a file"
    pushed = json.loads(here.succeed("profile", "push", image, "--json"))
    again = json.loads(
        elsewhere.succeed("profile", "push", image, "--profile", tmp_path / "app.json", "--json")
    )
    assert again["artifact"] == pushed["artifact"]
    found = shown(elsewhere, image)
    assert found["from"] == "pushed to the registry"
    assert [(t["layer"], t["chunk"]) for t in found["touches"]] == [
        (t["layer"], t["chunk"]) for t in exported["touches"]
    ]
    here.succeed("profile", "rm", image)
    assert here.succeed("profile", "ls", "--json") == ""
    assert "has no startup profile" in here.fail("profile", "rm", image)


def test_a_profile_of_another_image_is_not_pushed(
    here: Instance, image: str, tmp_path: Path, registry: RunningRegistry
) -> None:
    start(here, image)
    here.succeed("profile", "export", image, "-o", tmp_path / "app.json")
    write_layout(tmp_path / "other", [tar(file(b"x", b"y"))])
    other = registry.reference(tmp_path.name.replace("_", "-") + "-other")
    skopeo_push(tmp_path / "other", other)
    refusal = here.fail("profile", "push", other, "--profile", tmp_path / "app.json")
    assert "is not of the layers of" in refusal


def test_a_pack_is_made_of_what_a_node_has_recorded_or_nodes_have_pushed(
    here: Instance, image: str, tmp_path: Path
) -> None:
    assert "no startup profile was pushed" in here.fail(
        "index", "build", image, "--profile-from-registry"
    )
    start(here, image)
    chunks = shown(here, image)["chunks"]
    here.succeed("profile", "push", image)
    made = []
    for number, option in enumerate(("--profile-from-node", "--profile-from-registry")):
        output = tmp_path / f"{number}.fbx"
        built = json.loads(here.succeed("index", "build", image, option, "-o", output, "--json"))
        assert built["pack_chunks"] == chunks
        made.append(output.with_suffix(".fbp").read_bytes())
    assert made[0] == made[1]
    table = read_table(made[0], len(made[0]))
    assert table is not None
    assert sum(len(frame.places) for frame in table.frames) == chunks
    index = FileIndex.load((tmp_path / "0.fbx").read_bytes())
    table.check(index.digest, index.layers)
    decoder = PackDecoder(table.frames, index.layers)
    for (layer, chunk), data in decoder.feed(made[0][table.start :]):
        index.layers[layer].verify(chunk, data)
