"""Snapshots in the metadata store, made in one call."""

from __future__ import annotations

from typing import TYPE_CHECKING

from snapshotter.containerd.labels import TARGET
from snapshotter.containerd.lazy import LayerPlace
from snapshotter.containerd.snapshots import Kind, Usage

if TYPE_CHECKING:
    from collections.abc import Mapping

    from snapshotter.containerd.metadata import Metadata


def create(
    metadata: Metadata,
    key: str,
    parent: str = "",
    labels: Mapping[str, str] | None = None,
    kind: Kind = Kind.ACTIVE,
) -> int:
    planned = metadata.chain_under(parent)
    return metadata.create(
        kind, key, parent, labels or {}, planned=planned, settle=lambda snapshot: None
    )


def committed(metadata: Metadata, name: str, parent: str = "") -> int:
    created = create(metadata, f"{name} in the making", parent)
    metadata.commit(name, f"{name} in the making", {}, "", Usage(0, 0))
    return created


def lazy(
    metadata: Metadata, target: str, parent: str, image: str, depth: int, content: str = "00"
) -> bool:
    place = LayerPlace(image, depth, content, top=False)
    return metadata.create_lazy((target, f"{target} more"), parent, {TARGET: target}, place)
