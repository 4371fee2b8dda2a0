"""What containerd asks a snapshotter for when it unpacks a layer, and when it pulls one lazily."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from snapshotter.containerd.errors import AlreadyExistsError
from snapshotter.containerd.snapshots import Kind
from tests.support.lazy_images import digest, layer_labels, mounted

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from snapshotter.containerd.snapshotter import Snapshotter


async def write_layer(
    snapshotter: Snapshotter, name: str, parent: str, files: Mapping[str, str], folder: Path
) -> None:
    """Unpack a layer as containerd does: prepare, mount, write, unmount, commit."""
    mounts = await snapshotter.prepare(f"extract {name}", parent, {})
    with mounted(mounts, folder / "unpacking") as root:
        for path, content in files.items():
            (root / path).write_text(content)
    await snapshotter.commit(name, f"extract {name}", {}, "")


async def pull_lazily(snapshotter: Snapshotter, image: str, *layers: str, parent: str = "") -> str:
    """Prepare all layers as containerd does; the name of the topmost snapshot."""
    for number, layer in enumerate(layers):
        target = f"chain {' '.join(layers[: number + 1])}"
        labels = layer_labels(image, layer, target)
        with pytest.raises(AlreadyExistsError, match="target snapshot"):
            await snapshotter.prepare(f"ns/{image}/{layer}", parent, labels)
        parent = await find(snapshotter, digest(target), parent)
    return parent


async def find(snapshotter: Snapshotter, target: str, parent: str) -> str:
    """What containerd looks for after ALREADY_EXISTS (core/metadata/snapshot.go)."""
    (found,) = await snapshotter.list(
        [f'labels."containerd.io/snapshot.ref"=={target},parent=="{parent}"']
    )
    assert (found.kind, found.parent) == (Kind.COMMITTED, parent)
    assert found.labels["containerd.io/snapshot.ref"] == target
    return found.name
