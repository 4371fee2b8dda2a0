"""What labels say about the image that a snapshot is prepared for."""

from __future__ import annotations

import pytest

from snapshotter.containerd.labels import ImageLabels, image_labels, lazy_labels
from tests.support.lazy_images import digest, layer_labels

LABELS = layer_labels("image", "layer", "chain")


def test_a_layer_of_an_image_is_recognised() -> None:
    assert image_labels(LABELS) == ImageLabels(
        reference="registry.example/image:1",
        manifest_digest=digest("image"),
        layer_digest=digest("layer"),
        target=digest("chain"),
    )


@pytest.mark.parametrize("missing", [name for name in LABELS if not name.endswith("image-layers")])
@pytest.mark.parametrize("how", ["absent", "empty"])
def test_a_part_of_the_labels_says_nothing(missing: str, how: str) -> None:
    labels = {**LABELS, missing: ""}
    if how == "absent":
        del labels[missing]
    assert image_labels(labels) is None


def test_the_list_of_layers_is_not_needed_because_containerd_cuts_it() -> None:
    assert image_labels({k: v for k, v in LABELS.items() if not k.endswith("image-layers")})


def test_lazy_snapshots_keep_what_containerd_finds_them_by_and_are_marked() -> None:
    assert lazy_labels(LABELS, digest("image")) == {
        **LABELS,
        "containerd.io/snapshot/remote": "remote snapshot",
        "containerd.io/snapshot/firstbyte.image": digest("image"),
    }
