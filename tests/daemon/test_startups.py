"""What starts need is the last to be evicted."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from index.profile import Profile, Touch
from index.tables import CHUNK_SIZE, Codec
from snapshotter.daemon.startups import _keep_longest
from snapshotter.store.layers import LayerStore
from tests.support.blobs import make_layer, sample_bytes

if TYPE_CHECKING:
    from pathlib import Path

MADE = [make_layer(sample_bytes(4 * CHUNK_SIZE, seed), Codec.PLAIN) for seed in range(2)]
DIFF_IDS = tuple(layer.table.diff_id for layer in MADE)


def test_the_likely_chunks_of_a_profile_are_kept_longest(tmp_path: Path) -> None:
    rare = Touch(1, 2, 0, seen=1)
    profile = Profile(DIFF_IDS, (Touch(0, 3, 0, seen=9), Touch(1, 1, 5, seen=9), rare), runs=9)
    with LayerStore(tmp_path) as store:
        stored = [store.open(layer.table) for layer in MADE]
        image: Any = SimpleNamespace(
            layers=[SimpleNamespace(table=one.table, stored=one) for one in stored]
        )
        assert _keep_longest(image, profile)
        assert [one.start_chunks for one in stored] == [{3}, {1}]
        for one in stored:
            one.close()


def test_a_profile_of_another_image_or_of_chunks_that_are_not_there_is_not_used(
    tmp_path: Path,
) -> None:
    with LayerStore(tmp_path) as store:
        stored = [store.open(layer.table) for layer in MADE]
        image: Any = SimpleNamespace(
            layers=[SimpleNamespace(table=one.table, stored=one) for one in stored]
        )
        assert not _keep_longest(image, Profile(DIFF_IDS[::-1], (Touch(0, 1, 0),)))
        assert not _keep_longest(image, Profile(DIFF_IDS, (Touch(0, 1, 0), Touch(0, 4, 0))))
        assert [one.start_chunks for one in stored] == [frozenset(), frozenset()]
        for one in stored:
            one.close()
