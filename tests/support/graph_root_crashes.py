"""Kills a process that changes podman's image store before each of its steps on the disk, one after
another.

Run as a program: `python -m tests.support.graph_root_crashes FOLDER SCENARIO`. For each step there
is a new store in FOLDER, and two processes: one does the scenario and is gone before the step, the
other reads what podman would read, recovers, and does the scenario again. Prints how many steps
there were.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from snapshotter.podman.graph_root import GraphRoot, Layer, chain, link_name
from tests.support.crashes import KILLED, STEPS, Killer, in_child

if TYPE_CHECKING:
    from collections.abc import Callable

_STEPS = STEPS | {"os.symlink", "tempfile.mkstemp"}
_MOST_STEPS = 200


def add(store: GraphRoot) -> None:
    merged(store, "new:1", "new")


def add_under_another_name(store: GraphRoot) -> None:
    merged(store, "merged:2", "merged")


def follow_a_tag(store: GraphRoot) -> None:
    merged(store, "merged:1", "newer")


def add_layers(store: GraphRoot) -> None:
    layered(store, "layers:3", "a", "b", "e")


def remove(store: GraphRoot) -> None:
    for image in store.images():
        if image.names == ["merged:1"]:
            store.withdraw(image)
            store.sweep()


def remove_layers(store: GraphRoot) -> None:
    for image in store.images():
        if image.names == ["layers:1"]:
            store.withdraw(image)
            store.sweep()


def change_ones_mind(store: GraphRoot) -> None:
    (image,) = (one for one in store.images() if one.names == ["layers:1"])
    store.withdraw(image)
    store.restore(image)


def rename(store: GraphRoot) -> None:
    for image in store.images():
        if image.names == ["merged:1"]:
            store.rename(image, ["renamed:1"])


def point(store: GraphRoot) -> None:
    (image,) = (one for one in store.images() if one.names == ["merged:1"])
    store.point(image, store.path.parent / "elsewhere")


SCENARIOS = {
    work.__name__: work
    for work in (
        *(add, add_under_another_name, follow_a_tag, add_layers),
        *(remove, remove_layers, change_ones_mind, rename, point),
    )
}


def begin(store: GraphRoot) -> None:
    """What is there before each scenario: two of the images share a layer."""
    store.open()
    merged(store, "merged:1", "merged")
    layered(store, "layers:1", "a", "b", "c")
    layered(store, "layers:2", "a", "d")


def merged(store: GraphRoot, name: str, author: str) -> None:
    content = json.dumps({"architecture": "amd64", "os": "linux", "author": author}).encode()
    manifest = json.dumps({"schemaVersion": 2, "of": author}).encode()
    store.add(name, manifest, content, store.path.parent / author, 5)


def layered(store: GraphRoot, name: str, *letters: str) -> None:
    layers = chain(
        Layer(
            id="",
            created="2024-01-01T00:00:00Z",
            compressed_diff_digest=f"sha256:{letter * 64}",
            diff_digest=f"sha256:{letter * 64}",
            diff_size=5,
        )
        for letter in letters
    )
    content = json.dumps({"architecture": "amd64", "os": "linux", "author": name}).encode()
    manifest = json.dumps({"schemaVersion": 2, "of": name}).encode()
    store.add_layers(name, manifest, content, layers, store.path.parent / name)


def check_readable(path: Path) -> None:
    """Whatever podman finds by name or ID is whole."""
    images = _records(path, "images")
    layers = {layer["id"]: layer for layer in _records(path, "layers")}
    names = [name for image in images for name in image.get("names") or []]
    assert len(names) == len(set(names)), names
    for image in images:
        for key, digest in image["big-data-digests"].items():
            plain = re.fullmatch("[a-z0-9.]+", key)
            name = key if plain else "=" + base64.b64encode(key.encode()).decode()
            data = (path / "overlay-images" / image["id"] / name).read_bytes()
            assert digest == f"sha256:{hashlib.sha256(data).hexdigest()}"
        assert image["layer"] in layers
    for number, layer in layers.items():
        parent = layer.get("parent")
        assert not parent or parent in layers
        folder, short = path / "overlay" / number, path / "overlay/l" / link_name(number)
        assert (folder / "diff").is_symlink()
        assert (folder / "link").read_text() == link_name(number)
        assert os.readlink(short) == f"../{number}/diff"
        lower = (folder / "lower").read_text().split(":") if parent else []
        assert lower[:1] == ([f"l/{link_name(parent)}"] if parent else [])


def check_tidy(path: Path) -> None:
    """There is nothing but what is of an image, and each layer is where one of its images is."""
    images = _records(path, "images")
    layers = {layer["id"]: layer for layer in _records(path, "layers")}
    expected: dict[str, set[str]] = {}
    for image in images:
        place = json.loads(image["metadata"]).get("firstbyte-layers", "")
        layer = layers.get(image["layer"])
        while layer is not None:
            target = f"{place}/{layer.get('compressed-diff-digest')}/diff" if place else ""
            expected.setdefault(layer["id"], set()).add(target)
            layer = layers.get(layer.get("parent", ""))
    assert set(layers) == set(expected)
    assert set(os.listdir(path / "overlay")) == {*expected, "l"}
    assert set(os.listdir(path / "overlay/l")) == {link_name(layer) for layer in expected}
    for layer, targets in expected.items():
        if "" not in targets:
            assert os.readlink(path / "overlay" / layer / "diff") in targets
    assert {one for one in os.listdir(path / "overlay-images") if "." not in one} == {
        image["id"] for image in images
    }
    left = {one.name for one in path.glob("*/*") if one.name.startswith("withdrawn")}
    assert not left


def _records(path: Path, kind: str) -> list[dict[str, Any]]:
    directory = path / f"overlay-{kind}"
    found: list[dict[str, Any]] = json.loads((directory / f"{kind}.json").read_bytes())
    return found


def named(store: GraphRoot) -> dict[str, list[str]]:
    return {image.id: sorted(image.names or []) for image in store.images()}


def crash(folder: Path, work: Callable[[GraphRoot], None]) -> int:
    """How many steps `work` has, each of which it survived not being done."""
    undone, done = GraphRoot(folder / "undone/store"), GraphRoot(folder / "done/store")
    begin(undone)
    begin(done)
    work(done)
    states = [named(undone), named(done)]
    for step in range(1, _MOST_STEPS):
        path = folder / str(step) / "store"

        def first(path: Path = path, step: int = step) -> None:
            killer = Killer(step, _STEPS)
            store = GraphRoot(path)
            begin(store)
            killer.arm()
            work(store)

        def second(path: Path = path) -> None:
            check_readable(path)
            store = GraphRoot(path)
            store.open()
            check_readable(path)
            check_tidy(path)
            assert named(store) in states
            work(store)
            assert named(store) == states[1]
            check_readable(path)

        status = in_child(first)
        assert status in (0, KILLED), f"step {step}"
        assert in_child(second) == 0, f"step {step}"
        if status == 0:
            return step - 1
    raise AssertionError(f"more than {_MOST_STEPS} steps")


if __name__ == "__main__":
    os.fsync = lambda _: None  # it is the process that ends here, and not the power
    print(crash(Path(sys.argv[1]), SCENARIOS[sys.argv[2]]))
