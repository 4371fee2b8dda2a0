"""What of a store may go, in which order: the garbage collector's plan. Nothing here does I/O.

1. What is left of interrupted work, and what nothing names: no image, and nobody who uses it.
2. Layers that nobody uses, those used longest ago first, until enough is free.
3. Images that nobody uses and whose layers are all gone, with their file indexes.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Collection
    from pathlib import Path

    from snapshotter.store.inventory import ImageFacts, Inventory


class Why(enum.Enum):
    """Why something goes, for people."""

    LEFT = "left by work that was interrupted, or damaged"
    UNNAMED = "no image on this node has it"
    OLDEST = "unused for longest, and room is needed"
    UNUSED = "nobody uses it"
    EMPTY = "none of its data is here"


@dataclass(frozen=True, slots=True)
class InUse:
    """What is in use, and never goes: images by their manifests' digests, indexes by digest, layers
    by content key."""

    images: Collection[str] = frozenset()
    indexes: Collection[bytes] = frozenset()
    layers: Collection[bytes] = frozenset()


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to go, and why. Sizes are bytes of disk, `used_ns` since the epoch."""

    leftovers: dict[Path, Why]
    layers: dict[bytes, Why]
    indexes: dict[bytes, Why]
    images: dict[str, Why]

    def __bool__(self) -> bool:
        return bool(self.leftovers or self.layers or self.indexes or self.images)


def plan(
    inventory: Inventory,
    in_use: InUse,
    excess: int | None,
    *,
    kernel_uses: Callable[[bytes], bool],
    leftover: Callable[[Path], bool] = lambda _: True,
) -> Plan:
    """How to free `excess` bytes of disk, or as much as there is to free; None is all of that.

    `kernel_uses` tells whether a mount of the kernel's has a layer that is not in `in_use`;
    `leftover` whether one of the inventory's leftovers is one indeed. What nothing names goes in
    any case.
    """
    names = {facts.record.manifest_digest: facts for facts in inventory.images}
    used_images = [facts for digest, facts in names.items() if digest in in_use.images]
    kept = {*in_use.layers}.union(*(facts.record.content_keys for facts in used_images))
    named = {key for facts in names.values() for key in facts.record.content_keys}
    leftovers = {path: Why.LEFT for path in inventory.leftovers if leftover(path)}
    by_age = sorted(inventory.layers.values(), key=lambda layer: (layer.used_ns, layer.key))
    free = [one for one in by_age if one.key not in kept and not kernel_uses(one.key)]
    layers = {layer.key: Why.UNNAMED for layer in free if layer.key not in named}
    if excess is None:
        layers |= {layer.key: Why.UNUSED for layer in free if layer.key in named}
    else:
        excess -= sum(inventory.leftovers[path] for path in leftovers)
        excess -= sum(inventory.layers[key].disk for key in layers)
        for layer in free:
            if excess <= 0:
                break
            if layer.key in named:
                layers[layer.key] = Why.OLDEST
                excess -= layer.disk
    images = {
        digest: Why.EMPTY
        for digest, facts in sorted(names.items(), key=lambda one: _last_used(one[1], inventory))
        if digest not in in_use.images and _is_empty(facts, inventory, layers)
    }
    left = {
        index
        for digest, facts in names.items()
        if digest not in images
        for index in facts.record.all_indexes
    }
    gone = {index for digest in images for index in names[digest].record.all_indexes}
    indexes = {
        digest: Why.EMPTY if digest in gone else Why.UNNAMED
        for digest in inventory.indexes
        if digest not in left and digest not in in_use.indexes
    }
    return Plan(leftovers, layers, indexes, images)


def _last_used(facts: ImageFacts, inventory: Inventory) -> int:
    """When anything of an image was used last; 0 if nothing is here."""
    here = (inventory.layers.get(key) for key in facts.record.content_keys)
    return max((layer.used_ns for layer in here if layer is not None), default=0)


def _is_empty(facts: ImageFacts, inventory: Inventory, going: Collection[bytes]) -> bool:
    """Whether nothing of an image's data will be left."""
    keys = facts.record.content_keys
    return bool(keys) and all(key in going or key not in inventory.layers for key in keys)
