"""What takes how much of the store, and what goes from it, as it is told to clients."""

from __future__ import annotations

import logging
import shutil
from collections import Counter
from typing import TYPE_CHECKING

from index.errors import FirstByteError
from snapshotter.daemon import protocol
from snapshotter.registry.manifest import Manifest, parse

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from snapshotter.store.collection import InUse, Plan
    from snapshotter.store.images import ImageRecord
    from snapshotter.store.inventory import ImageFacts, Inventory
    from snapshotter.store.space import Space

log = logging.getLogger(__name__)


def listed(inventory: Inventory, plan: Plan) -> list[protocol.Garbage]:
    """What goes, in the order in which it does."""
    images = {facts.record.manifest_digest: facts for facts in inventory.images}
    names = {
        key: facts.record.reference
        for facts in images.values()
        for key in facts.record.content_keys
    }
    garbage = [
        protocol.Garbage(
            kind="file", name=str(path), why=why.value, bytes=inventory.leftovers[path]
        )
        for path, why in plan.leftovers.items()
    ]
    garbage += [
        protocol.Garbage(
            kind="layer",
            name=key.hex(),
            why=why.value,
            bytes=inventory.layers[key].disk,
            reference=names.get(key, ""),
            used_ns=inventory.layers[key].used_ns,
        )
        for key, why in plan.layers.items()
    ]
    garbage += [
        protocol.Garbage(
            kind="image",
            name=digest,
            why=why.value,
            bytes=images[digest].disk,
            reference=images[digest].record.reference,
            used_ns=images[digest].used_ns,
        )
        for digest, why in plan.images.items()
    ]
    garbage += [
        protocol.Garbage(
            kind="index", name=digest.hex(), why=why.value, bytes=inventory.indexes[digest]
        )
        for digest, why in plan.indexes.items()
    ]
    return garbage


def disk_usage(
    inventory: Inventory, in_use: InUse, users: Mapping[str, Sequence[str]], space: Space
) -> protocol.DiskUsage:
    """What takes how much. `users` are those of images, by digest; nothing is asked of the disk."""
    records = [facts.record for facts in inventory.images]
    having = Counter(key for record in records for key in {*record.content_keys})
    indexing = Counter(digest for record in records for digest in record.all_indexes)
    digests: dict[bytes, set[str]] = {}
    for record in records:
        for key, digest in zip(record.content_keys, _blobs(record), strict=False):
            digests.setdefault(key, set()).add(digest)
    kept = {*in_use.layers}.union(
        *(record.content_keys for record in records if record.manifest_digest in in_use.images)
    )
    unnamed = inventory.disk - sum(image.disk for image in inventory.images)
    unnamed -= sum(layer.disk for layer in inventory.layers.values() if having[layer.key])
    unnamed -= sum(size for digest, size in inventory.indexes.items() if indexing[digest])
    return protocol.DiskUsage(
        images=[
            _image(facts, inventory, having, indexing, list(users.get(_digest(facts), ())))
            for facts in sorted(inventory.images, key=lambda facts: facts.used_ns, reverse=True)
        ],
        layers=[
            protocol.LayerUsage(
                key=layer.key.hex(),
                digests=sorted(digests.get(layer.key, ())),
                size=layer.size,
                local=layer.local,
                disk=layer.disk,
                used_ns=layer.used_ns,
                images=having[layer.key],
                in_use=layer.key in kept,
            )
            for layer in inventory.layers.values()
        ],
        used=space.used,
        unnamed=unnamed,
        limit=space.marks.most,
        free=space.free,
    )


def remove_leftover(path: Path) -> None:
    """Delete a file or a directory that has no business in the store; what fails is logged."""
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        log.warning("%s stays: %s", path, error.strerror)


def _image(
    facts: ImageFacts,
    inventory: Inventory,
    having: Mapping[bytes, int],
    indexing: Mapping[bytes, int],
    users: list[str],
) -> protocol.ImageUsage:
    record = facts.record
    keys = dict.fromkeys(record.content_keys)
    layers = [inventory.layers[key] for key in keys if key in inventory.layers]
    taken = [(layer.disk, having[layer.key]) for layer in layers]
    taken += [(inventory.indexes.get(key, 0), indexing[key]) for key in record.all_indexes]
    return protocol.ImageUsage(
        reference=record.reference,
        digest=record.manifest_digest,
        size=sum(layer.size for layer in layers),
        local=sum(layer.local for layer in layers),
        shared=sum(disk for disk, images in taken if images > 1),
        exclusive=facts.disk + sum(disk for disk, images in taken if images == 1),
        used_ns=facts.used_ns,
        users=users,
        layers=[key.hex() for key in record.content_keys],
    )


def _digest(facts: ImageFacts) -> str:
    return facts.record.manifest_digest


def _blobs(record: ImageRecord) -> list[str]:
    """The digests of an image's layers, as its manifest has them, lowest first."""
    try:
        manifest = parse(record.manifest, "", record.reference)
    except FirstByteError:
        return []
    return [layer.digest for layer in manifest.layers] if isinstance(manifest, Manifest) else []
