"""Labels of snapshots: those that containerd sets for us, and those that we set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

# From containerd's core/snapshots/snapshotter.go and pkg/snapshotters/annotations.go. There also is
# `cri.image-layers`, which containerd cuts at 4096 bytes without a mark: nothing here reads it.
TARGET = "containerd.io/snapshot.ref"  # the chain ID that the snapshot will be committed as
REFERENCE = "containerd.io/snapshot/cri.image-ref"
MANIFEST = "containerd.io/snapshot/cri.manifest-digest"
LAYER = "containerd.io/snapshot/cri.layer-digest"
UID_MAPPING = "containerd.io/snapshot/uidmapping"  # "container:host:size", comma-separated
GID_MAPPING = "containerd.io/snapshot/gidmapping"

# Ours, on lazy snapshots. The first is what other snapshotters mark theirs with.
REMOTE = "containerd.io/snapshot/remote"
IMAGE = "containerd.io/snapshot/firstbyte.image"


@dataclass(frozen=True, slots=True)
class ImageLabels:
    """Which layer of which image a snapshot is prepared for.

    `manifest_digest` and `layer_digest` are of the compressed things in the registry, `target` is
    the chain ID of the layer and all below it.
    """

    reference: str
    manifest_digest: str
    layer_digest: str
    target: str


def image_labels(labels: Mapping[str, str]) -> ImageLabels | None:
    """What containerd says about the image, None unless it says all of it."""
    found = ImageLabels(
        reference=labels.get(REFERENCE, ""),
        manifest_digest=labels.get(MANIFEST, ""),
        layer_digest=labels.get(LAYER, ""),
        target=labels.get(TARGET, ""),
    )
    complete = found.reference and found.manifest_digest and found.layer_digest and found.target
    return found if complete else None


def lazy_labels(given: Mapping[str, str], image: str) -> dict[str, str]:
    """The labels of a lazy snapshot of `image` (a manifest's digest) prepared with `given`."""
    return {**given, REMOTE: "remote snapshot", IMAGE: image}
