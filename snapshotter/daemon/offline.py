"""The store's housekeeping where no daemon runs: under the store's lock, by what is on disk."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from functools import partial
from typing import TYPE_CHECKING

from snapshotter.containerd.database import Database
from snapshotter.containerd.metadata import Metadata
from snapshotter.daemon import protocol
from snapshotter.daemon.records import Records
from snapshotter.daemon.usage import disk_usage, listed, remove_leftover
from snapshotter.podman.graph_root import GraphRoot
from snapshotter.podman.held import HeldImages
from snapshotter.store.collection import InUse, plan
from snapshotter.store.errors import store_error
from snapshotter.store.images import ImageStore
from snapshotter.store.indexes import IndexStore
from snapshotter.store.inventory import kernel_uses, layer_directory, survey
from snapshotter.store.layers import own
from snapshotter.store.space import Space

if TYPE_CHECKING:
    from pathlib import Path

    from snapshotter.daemon.config import Config
    from snapshotter.daemon.places import Places
    from snapshotter.store.collection import Plan


def collect(
    places: Places, config: Config, *, everything: bool, dry_run: bool
) -> protocol.Collected:
    """What `Housekeeping.collect` does. Raises FirstByteError, if a daemon has begun, too."""
    root = places.root
    if not root.exists():
        return protocol.Collected(garbage=[], freed=0)
    owner = own(root)
    try:
        space = Space(root, config.store.bounds)
        before = space.used
        inventory = survey(root)
        found = plan(
            inventory,
            InUse(images=set(_users(places))),
            None if everything else before - space.marks.fill,
            kernel_uses=partial(kernel_uses, root),
        )
        if not dry_run:
            _carry_out(root, found)
            space.measure()
        return protocol.Collected(garbage=listed(inventory, found), freed=before - space.used)
    finally:
        os.close(owner)


def usage(places: Places, config: Config) -> protocol.DiskUsage:
    """What `Housekeeping.usage` tells. Raises FirstByteError."""
    if not places.root.exists():
        return protocol.DiskUsage(images=[], layers=[], used=0, unnamed=0, limit=0, free=0)
    users = _users(places)
    space = Space(places.root, config.store.bounds)
    return disk_usage(survey(places.root), InUse(images=set(users)), users, space)


def _users(places: Places) -> dict[str, list[str]]:
    """Who will want which images when a daemon runs again."""
    records = Records(places.records)
    users: dict[str, list[str]] = {view.image: [] for view in records.views}
    for mount in records.mounts:
        users.setdefault(mount.digest, []).append(mount.target)
    for held in HeldImages(places.podman_held).images:
        users.setdefault(held.manifest, []).append(f"podman ({held.reference})")
    for image in GraphRoot(places.podman_images).images():
        name = next(iter(image.names or [image.id[:12]]))
        users.setdefault(image.original, []).append(f"podman ({name})")
    path = places.root / "containerd" / "metadata.db"
    if path.exists():
        database = Database(path)
        try:
            places_of = [record.place for record in Metadata(database).all()]
        finally:
            database.close()
        for digest, count in Counter(place.image for place in places_of if place).items():
            users.setdefault(digest, []).append(f"containerd ({count} snapshots)")
    return users


def _carry_out(root: Path, found: Plan) -> None:
    for path in found.leftovers:
        remove_leftover(path)
    for key in found.layers:
        directory = layer_directory(root, key)
        try:
            shutil.rmtree(directory)
        except OSError as error:
            raise store_error(error, directory, "cannot remove") from error
    images, indexes = ImageStore(root), IndexStore(root)
    for digest in found.images:
        images.remove(digest)
    for index in found.indexes:
        indexes.remove(index)
