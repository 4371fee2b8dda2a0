"""Which startup profile a person means, and where it is."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from index import profile as profiles
from index.errors import about
from index.file import FileIndex
from snapshotter.cli.connection import chosen_platform, connect
from snapshotter.daemon.records import Records
from snapshotter.images.discovery import find_index
from snapshotter.images.profiles import find_profile
from snapshotter.registry.chain import chain_ids
from snapshotter.registry.errors import InvalidReferenceError, NotFoundError
from snapshotter.registry.manifest import parse_config
from snapshotter.registry.reference import LAYOUT_PREFIX, Reference
from snapshotter.store.images import ImageStore
from snapshotter.store.indexes import IndexStore
from snapshotter.store.profiles import ProfileStore

if TYPE_CHECKING:
    from index.profile import Profile
    from snapshotter.daemon.places import Places
    from snapshotter.registry.image import ImageSource, ResolvedImage
    from snapshotter.store.images import ImageRecord


def read_profile(path: Path) -> Profile:
    """A profile in a file. Raises FormatError."""
    with about(str(path)):
        return profiles.decode(path.read_bytes())


def node_profile(places: Places, image: ResolvedImage) -> Profile:
    """What a node has recorded of an image. Raises NotFoundError."""
    diff_ids = image.config.rootfs.diff_ids
    store = ProfileStore(places.root, writer=False)
    found = store.get(chain_ids(diff_ids)[-1]) if diff_ids else None
    if found is None:
        raise none_here(image.name)
    return found


async def pushed_profile(source: ImageSource, image: ResolvedImage) -> Profile:
    """What nodes have pushed for an image, merged. Raises NotFoundError or RegistryError."""
    found = await find_profile(source, image)
    if found is None:
        raise NotFoundError(
            f"no startup profile was pushed for {image.name}",
            hint="push that of a node: firstbyte profile push",
        )
    return found


def none_here(what: str) -> NotFoundError:
    """What to raise where a node lacks a profile."""
    return NotFoundError(
        f"this node has no startup profile of {what}",
        hint="it records one when the image starts before all of it is there; "
        "`firstbyte profile ls` lists what it has",
    )


@dataclass(frozen=True, slots=True)
class Found:
    """A profile, where it is from in words, and the file index of its image."""

    profile: Profile
    origin: str
    index: FileIndex | None = None


async def find(
    what: str, places: Places, platform: str | None, plain_http: bool, *, files: bool = False
) -> Found:
    """The profile that a person means: of a file, a directory, an image, a digest.

    With `files` the image's file index comes along, if there is one. Raises FirstByteError.
    """
    if await trio.Path(what).is_file():
        return Found(read_profile(Path(what)), "a file")
    store = ProfileStore(places.root, writer=False)
    chain_id = _known_here(what, places)
    found = None if chain_id is None else store.get(chain_id)
    if found is not None and not files:
        return Found(found, "recorded on this node")
    index = None if chain_id is None else _index_here(chain_id, places)
    if found is not None and (index is not None or not _may_be_image(what)):
        return Found(found, "recorded on this node", index)
    if not _may_be_image(what):
        raise none_here(what)
    async with connect(plain_http=plain_http) as locations:
        source = locations.source(what)
        image = await source.resolve(chosen_platform(platform))
        origin = "recorded on this node"
        if found is None and image.config.rootfs.diff_ids:
            found = store.get(chain_ids(image.config.rootfs.diff_ids)[-1])
        if found is None:
            found, origin = await find_profile(source, image), "pushed to the registry"
        if found is None:
            raise none_here(what)
        if files:
            indexed = await find_index(source, image)
            index = None if indexed is None else indexed.index
    return Found(found, origin, index)


async def chain_id_of(what: str, places: Places, platform: str | None, plain_http: bool) -> str:
    """The chain ID that names a profile on this node. Raises FirstByteError."""
    chain_id = _known_here(what, places)
    if chain_id is not None:
        return chain_id
    if not _may_be_image(what):
        raise none_here(what)
    async with connect(plain_http=plain_http) as locations:
        image = await locations.source(what).resolve(chosen_platform(platform))
    chains = chain_ids(image.config.rootfs.diff_ids)
    if not chains:
        raise none_here(what)
    return chains[-1]


def _may_be_image(what: str) -> bool:
    return not (what.startswith(("/", "./", "../", "sha256:")) or Path(what).is_dir())


def _known_here(what: str, places: Places) -> str | None:
    """The chain ID of what is mounted on a directory, or of what this node knows by that name."""
    images = ImageStore(places.root, writer=False)
    store = ProfileStore(places.root, writer=False)
    if Path(what).is_dir() and not what.startswith(LAYOUT_PREFIX):
        target = os.path.realpath(what)
        for mount in Records(places.records).mounts:
            if mount.target == target:
                record = images.get(mount.digest)
                return None if record is None else _chain_of(record)
        return None
    if what.startswith("sha256:"):
        if what in store.chain_ids():
            return what
        return next((_chain_of(r) for r in images.all() if r.manifest_digest == what), None)
    wanted = _normal(what)
    for chain_id in store.chain_ids():
        found = store.get(chain_id)
        if found is not None and found.name and _normal(found.name) == wanted:
            return chain_id
    return next((_chain_of(r) for r in images.all() if _normal(r.reference) == wanted), None)


def _index_here(chain_id: str, places: Places) -> FileIndex | None:
    """The file index of an image that this node has."""
    for record in ImageStore(places.root, writer=False).all():
        if _chain_of(record) == chain_id:
            path = IndexStore(places.root, writer=False).get(record.index_digest)
            if path is not None:
                return FileIndex.open(path)
    return None


def _chain_of(record: ImageRecord) -> str:
    config = parse_config(record.config, f"the configuration of {record.reference}")
    return (chain_ids(config.rootfs.diff_ids) or [""])[-1]


def _normal(name: str) -> str:
    if name.startswith(LAYOUT_PREFIX):
        return name
    try:
        return str(Reference.parse(name))
    except InvalidReferenceError:
        return name
