"""The additional image store on disk: what containers/storage expects, whatever happened before."""

from __future__ import annotations

import base64
import fcntl
import hashlib
import json
import os
from typing import TYPE_CHECKING, Any

import pytest

from snapshotter.fuse.live import Call
from snapshotter.podman.graph_root import GraphRoot, Image, Layer, chain, link_name
from snapshotter.podman.held import HeldImages
from snapshotter.podman.layer_store import decode_reference, encode_reference
from snapshotter.podman.merged import merged_image

if TYPE_CHECKING:
    from pathlib import Path

MANIFEST = b'{"schemaVersion":2}'


def config(**fields: object) -> bytes:
    return json.dumps({"architecture": "amd64", "os": "linux", **fields}).encode()


@pytest.fixture
def store(tmp_path: Path) -> GraphRoot:
    made = GraphRoot(tmp_path / "store")
    made.open()
    return made


def records(store: GraphRoot, kind: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(
        (store.path / f"overlay-{kind}" / f"{kind}.json").read_bytes()
    )
    return found


def writer(store: GraphRoot) -> bytes:
    return (store.path / "overlay-images/images.lock").read_bytes()


def test_an_empty_store_has_what_podman_needs_to_start(store: GraphRoot) -> None:
    for kind in ("images", "layers"):
        assert records(store, kind) == []
        assert len((store.path / f"overlay-{kind}" / f"{kind}.lock").read_bytes()) == 64
    assert (store.path / "overlay/l").is_dir()


def test_an_image_has_one_layer_which_is_a_link_to_its_tree(
    store: GraphRoot, tmp_path: Path
) -> None:
    before = writer(store)
    image = store.add("registry.example/app:1", MANIFEST, config(), tmp_path, 5)
    assert writer(store) != before
    (layer,) = records(store, "layers")
    assert layer["id"] == image.layer
    assert layer["diff-size"] == 5
    folder = store.path / "overlay" / image.layer
    assert (folder / "diff").readlink() == tmp_path
    assert (folder / "link").read_text() == link_name(image.layer)
    assert (store.path / "overlay/l" / link_name(image.layer) / "..").resolve() == tmp_path.parent
    (record,) = records(store, "images")
    for key, digest in record["big-data-digests"].items():
        name = key if key == "manifest" else "=" + base64.b64encode(key.encode()).decode()
        data = (store.path / "overlay-images" / image.id / name).read_bytes()
        assert digest == f"sha256:{hashlib.sha256(data).hexdigest()}"
        assert record["big-data-sizes"][key] == len(data)


def test_a_name_is_one_images_alone(store: GraphRoot, tmp_path: Path) -> None:
    old = store.add("app:1", MANIFEST, config(), tmp_path, 5)
    new = store.add("app:1", MANIFEST + b" ", config(author="another"), tmp_path, 5)
    assert {image.id: image.names for image in store.images()} == {old.id: [], new.id: ["app:1"]}
    assert store.add("app:2", MANIFEST, config(), tmp_path, 5).names == ["app:2"]


def test_an_image_that_was_withdrawn_can_come_back(store: GraphRoot, tmp_path: Path) -> None:
    image = store.add("app:1", MANIFEST, config(), tmp_path, 5)
    store.withdraw(image)
    assert store.images() == []
    assert (store.path / "overlay" / image.layer / "diff").exists()
    store.restore(image)
    assert store.images() == [image]
    store.withdraw(image)
    again = GraphRoot(store.path)
    again.open()  # after a crash, before which somebody may have come to use it
    assert again.images() == [image]


def add_layers(store: GraphRoot, name: str, directory: Path, *layers: str) -> Image:
    """An image of layers whose digests are made of these letters."""
    made = chain(
        Layer(
            id="",
            created="2024-01-01T00:00:00Z",
            compressed_diff_digest=f"sha256:{letter.upper() * 64}",
            compressed_size=3,
            diff_digest=f"sha256:{letter * 64}",
            diff_size=5,
        )
        for letter in layers
    )
    content = config(author=name)
    return store.add_layers(name, MANIFEST + name.encode(), content, made, directory)


def test_an_image_of_its_own_layers_names_them_as_podman_would(
    store: GraphRoot, tmp_path: Path
) -> None:
    image = add_layers(store, "app:1", tmp_path / "1", "a", "b")
    assert (
        image.original
        == image.digest
        == f"sha256:{hashlib.sha256(MANIFEST + b'app:1').hexdigest()}"
    )
    below, top = store.layers_of(image)
    assert below.id == "a" * 64
    assert top.id == hashlib.sha256(f"{below.id}+{'b' * 64}".encode()).hexdigest()
    folder = store.path / "overlay" / top.id
    place = tmp_path / "1" / top.compressed_diff_digest
    assert (folder / "diff").readlink() == place / "diff"
    assert (folder / "additionallayer").read_text() == str(place)
    assert (folder / "lower").read_text() == f"l/{link_name(below.id)}"
    assert not (store.path / "overlay" / below.id / "lower").exists()


def test_a_layer_that_images_share_is_found_with_one_that_stays(
    store: GraphRoot, tmp_path: Path
) -> None:
    first = add_layers(store, "app:1", tmp_path / "1", "a", "b")
    add_layers(store, "app:2", tmp_path / "2", "a", "c")
    assert len(records(store, "layers")) == 3
    store.withdraw(first)
    store.sweep()
    assert len(records(store, "layers")) == 2
    diff = store.path / "overlay" / ("a" * 64) / "diff"
    assert diff.readlink().is_relative_to(tmp_path / "2")
    GraphRoot(store.path).open()
    assert len(records(store, "layers")) == 2


def test_what_is_of_no_image_goes(store: GraphRoot, tmp_path: Path) -> None:
    """A crash between layer and image, or in the middle of removing one, leaves such things."""
    kept = store.add("app:1", MANIFEST, config(), tmp_path, 5)
    gone = store.add("app:2", MANIFEST + b" ", config(author="another"), tmp_path, 5)
    listed = store.path / "overlay-images/images.json"
    listed.write_text(json.dumps([one for one in records(store, "images") if one["id"] != gone.id]))
    again = GraphRoot(store.path)
    again.open()
    assert [layer["id"] for layer in records(store, "layers")] == [kept.layer]
    assert sorted(path.name for path in (store.path / "overlay").iterdir()) == sorted(
        ["l", kept.layer]
    )
    assert os.listdir(store.path / "overlay/l") == [link_name(kept.layer)]
    assert not (store.path / "overlay-images" / gone.id).exists()
    assert tmp_path.exists()


def test_readers_are_waited_for(store: GraphRoot, tmp_path: Path) -> None:
    """The lock is the one that containers/storage takes: a POSIX record lock."""
    path = store.path / "overlay-images/images.lock"
    child = os.fork()
    if child == 0:
        file = path.open()
        fcntl.lockf(file, fcntl.LOCK_SH)
        (tmp_path / "locked").touch()
        while not (tmp_path / "go").exists():
            os.sched_yield()
        (tmp_path / "read").write_bytes(path.with_name("images.json").read_bytes())
        os._exit(0)
    while not (tmp_path / "locked").exists():
        os.sched_yield()
    (tmp_path / "go").touch()
    store.add("app:1", MANIFEST, config(), tmp_path, 5)
    os.waitpid(child, 0)
    assert (tmp_path / "read").read_bytes() == b"[]"


def test_history_speaks_of_one_layer() -> None:
    entries = [{"created_by": "a"}, {"created_by": "b", "empty_layer": True}, {"created_by": "c"}]
    made = merged_image(MANIFEST, config(history=entries), 5)
    written = json.loads(made.data[f"sha256:{made.id}"])
    assert [one.get("empty_layer", False) for one in written["history"]] == [True, True, False]
    assert len(written["rootfs"]["diff_ids"]) == 1
    for none in ({}, {"history": None}, {"history": [{"empty_layer": True}]}):
        made = merged_image(MANIFEST, config(**none), 5)
        history = json.loads(made.data[f"sha256:{made.id}"])["history"]
        assert sum(not one.get("empty_layer", False) for one in history) == 1


@pytest.mark.parametrize("created", ["yesterday", 7, None, "2024-01-01T00:00:00"])
def test_a_time_that_go_cannot_read_is_none(created: object) -> None:
    assert merged_image(MANIFEST, config(created=created), 5).created == "0001-01-01T00:00:00Z"


def test_a_time_is_written_as_go_reads_it() -> None:
    made = merged_image(MANIFEST, config(created="2024-01-02T03:04:05.123456789+01:00"), 5)
    assert made.created == "2024-01-02T02:04:05.123456Z"


def test_only_whole_references_are_directories_of_the_layer_store() -> None:
    name = encode_reference("docker.io/library/app:1")
    assert decode_reference(name) == "docker.io/library/app:1"
    for wrong in (b"", b"pool", b"a", encode_reference("app"), encode_reference("UPPER:1"), b"=="):
        assert decode_reference(wrong) is None


def test_uses_of_layers_are_counted_on_disk(tmp_path: Path) -> None:
    path = tmp_path / "podman/layers.json"
    held = HeldImages(path)
    first = held.add("app:1", "sha256:a", 2)
    second = held.add("app:2", "sha256:b", 3)
    assert (first.number, second.number) == (0, 2)
    first = held.change(first, 1, 1, Call(2, again=False))
    assert HeldImages(path).images == [first, second]
    assert first.counts == [0, 1]
    assert held.change(first, 0, -1, Call(4, again=False)).counts == [0, 1]
    assert HeldImages(path).has_counted(Call(2, again=True))
    assert not HeldImages(path).has_counted(Call(2, again=False))
    assert not HeldImages(path).has_counted(Call(6, again=True))
    held.begin_mount()
    assert not HeldImages(path).has_counted(Call(2, again=True))
    held.remove(second)
    assert HeldImages(path).add("app:3", "sha256:c", 1).number == 5
