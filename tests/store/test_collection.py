"""What goes from a store, and what never does."""

from __future__ import annotations

import os
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from index.tables import CHUNK_SIZE, Codec
from snapshotter.store.collection import InUse, Why, plan
from snapshotter.store.images import ImageRecord, ImageStore
from snapshotter.store.indexes import IndexStore
from snapshotter.store.inventory import ImageFacts, Inventory, LayerFacts, survey
from snapshotter.store.layers import LayerStore
from tests.support.blobs import make_layer, sample_bytes
from tests.support.images import digest, sample_image

NUMBERS = st.integers(0, 7)


def key(number: int) -> bytes:
    return bytes([number]) * 32


def record(name: str, layers: list[int], indexes: list[int]) -> ImageRecord:
    return ImageRecord(
        reference=name,
        manifest_digest=name,
        manifest=b"",
        config=b"",
        index_digest=key(indexes[0]),
        trust="local",
        content_keys=[key(number) for number in layers],
        prefixes={depth: key(number) for depth, number in enumerate(indexes[1:])},
    )


@st.composite
def stores(draw: st.DrawFn) -> Inventory:
    layers = draw(st.dictionaries(NUMBERS, st.tuples(st.integers(0, 100), st.integers(0, 9))))
    images = draw(st.lists(st.tuples(st.lists(NUMBERS), st.lists(NUMBERS, min_size=1)), max_size=5))
    return Inventory(
        layers={
            key(number): LayerFacts(key(number), disk, 0, 0, used)
            for number, (disk, used) in layers.items()
        },
        indexes={key(number): 1 for number in draw(st.sets(NUMBERS))},
        images=[
            ImageFacts(record(f"image {number}", *parts), 1, 0)
            for number, parts in enumerate(images)
        ],
        leftovers={Path(f"/{number}"): 5 for number in draw(st.sets(NUMBERS, max_size=2))},
    )


@given(
    inventory=stores(),
    excess=st.none() | st.integers(0, 500),
    used_images=st.sets(st.integers(0, 4)),
    used_indexes=st.sets(NUMBERS),
    open_layers=st.sets(NUMBERS),
    kernels=st.sets(NUMBERS),
)
def test_what_is_in_use_stays_and_of_the_rest_the_oldest_goes_as_far_as_needed(
    inventory: Inventory,
    excess: int | None,
    used_images: set[int],
    used_indexes: set[int],
    open_layers: set[int],
    kernels: set[int],
) -> None:
    in_use = InUse(
        images={f"image {number}" for number in used_images},
        indexes={*map(key, used_indexes)},
        layers={*map(key, open_layers)},
    )
    held = {*map(key, kernels)}
    found = plan(inventory, in_use, excess, kernel_uses=held.__contains__)
    records = {facts.record.manifest_digest: facts.record for facts in inventory.images}

    # Nothing that is in use.
    kept = held.union(in_use.layers)
    for name in in_use.images & records.keys():
        kept.update(records[name].content_keys)
    assert not found.layers.keys() & kept
    assert not found.images.keys() & in_use.images
    assert not found.indexes.keys() & {*in_use.indexes}
    left = [records[name] for name in records.keys() - found.images.keys()]
    assert not found.indexes.keys() & {index for image in left for index in image.all_indexes}

    # Everything that nothing names.
    assert found.leftovers.keys() == inventory.leftovers.keys()
    named = {one for image in records.values() for one in image.content_keys}
    orphans = inventory.layers.keys() - named - kept
    assert {one for one, why in found.layers.items() if why is Why.UNNAMED} == orphans

    # Of what is named, the oldest, and no more than was asked for.
    could = (inventory.layers.keys() & named) - kept
    went = [inventory.layers[one] for one in found.layers if one in named]
    stays = [inventory.layers[one] for one in could - found.layers.keys()]
    assert all(old.used_ns <= new.used_ns for old in went for new in stays)
    if excess is None:
        assert not stays
    else:
        excess -= sum(inventory.layers[one].disk for one in orphans) + 5 * len(found.leftovers)
        freed = [layer.disk for layer in went]
        assert sum(freed) >= excess or not stays
        assert not freed or sum(freed[:-1]) < excess

    # Images go when nothing of them is left, and their indexes with them.
    there = inventory.layers.keys() - found.layers.keys()
    for name, image in records.items():
        empty = bool(image.content_keys) and not there & {*image.content_keys}
        assert (name in found.images) == (empty and name not in in_use.images)


def test_images_go_in_the_order_in_which_they_were_used_last() -> None:
    used = {1: 7, 2: 9, 3: 8}
    inventory = Inventory(
        layers={key(one): LayerFacts(key(one), 5, 0, 0, used_ns) for one, used_ns in used.items()},
        indexes={},
        images=[
            ImageFacts(record("latest", [1, 2], [1]), 1, 0),
            ImageFacts(record("oldest", [1], [1]), 1, 0),
            ImageFacts(record("other", [3], [1]), 1, 0),
        ],
        leftovers={},
    )
    found = plan(inventory, InUse(set(), set(), set()), None, kernel_uses=lambda _: False)
    assert [*found.images] == ["oldest", "other", "latest"]


def test_a_survey_finds_everything_and_changes_nothing(tmp_path: Path) -> None:
    layer = make_layer(sample_bytes(3 * CHUNK_SIZE + 10), Codec.PLAIN)
    image = sample_image()
    with LayerStore(tmp_path) as store:
        stored = store.open(layer.table)
        for chunk in (0, 3):
            stored.write(chunk, layer.chunk(chunk))
    IndexStore(tmp_path).put(key(1), b"index")
    IndexStore(tmp_path).tree(key(1), b"tree")
    images = ImageStore(tmp_path)
    images.put(
        ImageRecord(
            reference="example/app",
            manifest_digest=digest(image.manifest.raw),
            manifest=image.manifest.raw,
            config=image.config,
            index_digest=key(1),
            trust="local",
            content_keys=[layer.table.content_key],
        )
    )
    wrong = [
        tmp_path / "images" / f"{'0' * 64}.json",
        tmp_path / "images" / ".new-x",
        tmp_path / "indexes" / ".new-y",
        tmp_path / "indexes" / "nothing",
        tmp_path / "layers" / f".gone-{'0' * 64}",
    ]
    for path in wrong:
        path.write_bytes(b"?" * 5000)
    os.utime(tmp_path / "layers" / layer.table.content_key.hex(), (7, 7))
    before = sorted(tmp_path.rglob("*"))
    found = survey(tmp_path)
    assert sorted(tmp_path.rglob("*")) == before
    (facts,) = found.layers.values()
    assert (facts.key, facts.used_ns) == (layer.table.content_key, 7 * 10**9)
    assert (facts.size, facts.local) == (3 * CHUNK_SIZE + 10, CHUNK_SIZE + 10)
    assert facts.disk > CHUNK_SIZE
    assert found.indexes.keys() == {key(1)}
    assert [one.record.reference for one in found.images] == ["example/app"]
    assert found.leftovers.keys() == {*wrong}
    assert all(size >= 5000 for size in found.leftovers.values())


def test_of_a_damaged_bitmap_nothing_is_believed(tmp_path: Path) -> None:
    layer = make_layer(sample_bytes(CHUNK_SIZE), Codec.PLAIN)
    with LayerStore(tmp_path) as store:
        store.open(layer.table).write(0, layer.chunk(0))
    path = tmp_path / "layers" / layer.table.content_key.hex() / "present"
    data = bytearray(path.read_bytes())
    for offset, expected in ((512, (CHUNK_SIZE, 0)), (3, (0, 0))):
        data[offset] ^= 2
        path.write_bytes(data)
        (facts,) = survey(tmp_path).layers.values()
        assert (facts.size, facts.local) == expected
    path.unlink()
    (facts,) = survey(tmp_path).layers.values()
    assert (facts.size, facts.local) == (0, 0)


def test_an_empty_root_has_nothing(tmp_path: Path) -> None:
    found = survey(tmp_path / "none")
    assert found == Inventory({}, {}, [], {})
    assert not plan(found, InUse(), None, kernel_uses=lambda _: False)
