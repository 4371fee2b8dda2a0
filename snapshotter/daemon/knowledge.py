"""What this node has learnt about images: mounting one again asks the network for less."""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

import msgspec
import trio

from index.errors import FirstByteError, IntegrityError
from index.file import FileIndex
from snapshotter.images.artifact import PACK_TYPE, check_belongs
from snapshotter.images.discovery import FoundIndex, Trust
from snapshotter.registry.image import ResolvedImage
from snapshotter.registry.manifest import Descriptor, Manifest, check_image, parse, parse_config
from snapshotter.registry.reference import LAYOUT_PREFIX, Reference
from snapshotter.store.errors import StoreError
from snapshotter.store.images import ImageRecord, ImageStore
from snapshotter.store.indexes import IndexStore

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable
    from pathlib import Path

    from snapshotter.store.layers import LayerStore

log = logging.getLogger(__name__)


class Knowledge:
    """Image records and file indexes on disk. What is damaged there counts as not known."""

    def __init__(self, root: Path, opened: Iterable[FileIndex] = ()) -> None:
        """`opened` are indexes of this node that were opened before. Raises StoreError."""
        self._records = ImageStore(root)
        # Held while one is read and written back: lower layers are recorded while the proof of all
        # of them ends, each in a thread.
        self._changing = threading.Lock()
        self._indexes = IndexStore(root)
        self._opened = WeakValueDictionary({index.digest: index for index in opened})
        # The files of indexes, as they were when this process checked them.
        self._checked = {digest: index.state for digest, index in self._opened.items()}
        self.unrecorded: set[bytes] = set()
        """Digests of indexes that were kept, and that no record names yet: an image is being opened
        with them, or could not be."""

    async def resolve(self, reference: str) -> ResolvedImage | None:
        """An image that is named by its manifest's digest, if this node has had it before.

        A tag may mean another image today, so it is always asked for.
        """
        if reference.startswith(LAYOUT_PREFIX):
            return None
        digest = Reference.parse(reference).digest
        if digest is None:
            return None
        record = await trio.to_thread.run_sync(self._records.get, digest)
        if record is None:
            return None
        return _resolved(msgspec.structs.replace(record, reference=reference))

    async def recall(
        self, manifest_digest: str, depth: int | None
    ) -> tuple[ResolvedImage, FoundIndex] | None:
        """An image that this node has had before, with the file index of its lower `depth` layers
        (None: of all).

        None if any of that is gone.
        """
        record = await trio.to_thread.run_sync(self._records.get, manifest_digest)
        image = None if record is None else _resolved(record)
        found = None if image is None else await self.index_of(image)
        if image is None or found is None:
            return None
        if depth in (None, len(image.manifest.layers)):
            return image, found
        assert depth is not None
        lower = await self.prefix_of(manifest_digest, depth)
        return None if lower is None else (image, FoundIndex(lower, found.trust))

    async def index_of(self, image: ResolvedImage) -> FoundIndex | None:
        """The file index that was used last time."""
        record = await trio.to_thread.run_sync(self._records.get, image.descriptor.digest)
        if record is None:
            return None
        try:
            index = await trio.to_thread.run_sync(self._open, record.index_digest)
            if index is not None:
                check_belongs(index, image)
                return FoundIndex(index, Trust(record.trust), _pack_of(record))
        except (FirstByteError, ValueError) as error:
            log.warning("the file index of %s on this node is not used: %s", image.name, error)
        return None

    async def keep_index(self, index: FileIndex) -> FileIndex:
        """Store an index and map it from there, which costs no memory. Raises StoreError."""

        def keep() -> FileIndex:
            self.unrecorded.add(index.digest)
            self._indexes.put(index.digest, index.expanded)
            kept = self._open(index.digest)
            assert kept is not None
            return kept

        return await trio.to_thread.run_sync(keep)

    async def remember(self, image: ResolvedImage, found: FoundIndex) -> None:
        """Record an image and the index it is used with, durably. Raises StoreError."""
        record = ImageRecord(
            reference=image.name,
            manifest_digest=image.descriptor.digest,
            manifest=image.manifest.raw,
            config=image.raw_config,
            index_digest=found.index.digest,
            trust=found.trust.value,
            content_keys=[table.content_key for table in found.index.layers],
            pack=found.pack.digest if found.pack is not None else "",
            pack_size=found.pack.size if found.pack is not None else 0,
        )

        def write() -> None:
            with self._changing:
                known = self._records.get(record.manifest_digest)
                now = record
                if known is not None and known.index_digest == record.index_digest:
                    now = msgspec.structs.replace(record, prefixes=known.prefixes)
                if now == known:
                    self.touch(now.manifest_digest)
                else:
                    self._indexes.sync(now.index_digest)
                    self._records.put(now)
                self.unrecorded.discard(now.index_digest)

        await trio.to_thread.run_sync(write)

    def touch(self, manifest_digest: str) -> None:
        """An image is used now."""
        self._records.touch(manifest_digest)

    async def prefix_of(self, manifest_digest: str, depth: int) -> FileIndex | None:
        """The file index of an image's lower `depth` layers, if this node has made it before."""

        def find() -> FileIndex | None:
            record = self._records.get(manifest_digest)
            digest = None if record is None else record.prefixes.get(depth)
            return None if digest is None else self._open(digest)

        try:
            return await trio.to_thread.run_sync(find)
        except FirstByteError as error:
            log.warning("an index of lower layers is made again: %s", error)
            return None

    async def keep_prefix(self, manifest_digest: str, depth: int, index: FileIndex) -> FileIndex:
        """Store the file index of the lower `depth` layers of a remembered image, durably.

        Raises StoreError.
        """
        kept = await self.keep_index(index)

        def record() -> None:
            self._indexes.sync(index.digest)
            with self._changing:
                known = self._records.get(manifest_digest)
                if known is not None:
                    prefixes = {**known.prefixes, depth: index.digest}
                    self._records.put(msgspec.structs.replace(known, prefixes=prefixes))
                    self.unrecorded.discard(index.digest)

        await trio.to_thread.run_sync(record)
        return kept

    async def forget(
        self, manifest_digest: str, store: LayerStore, in_use: Collection[bytes]
    ) -> None:
        """Forget an image that is not open, and delete what is of no other image's.

        `in_use` are digests of indexes that are open; the store knows which layers are. Nobody may
        be opening the image meanwhile. Raises StoreError.
        """

        def sweep() -> None:
            with self._changing:
                gone = self._records.get(manifest_digest)
                self._records.remove(manifest_digest)
                if gone is None:
                    return
                left = self._records.all()
                indexes = {digest for record in left for digest in record.all_indexes}
                for digest in gone.all_indexes - indexes - self.unrecorded - {*in_use}:
                    self._indexes.remove(digest)
            layers = {key for record in left for key in record.content_keys}
            store.remove([key for key in gone.content_keys if key not in layers])

        await trio.to_thread.run_sync(sweep)

    async def trim(self, manifest_digest: str, depth: int, store: LayerStore) -> None:
        """Delete the data of layers above the lower `depth` ones, but what other images have.

        The image can still be opened; what is read of those layers is fetched again. Raises
        StoreError.
        """

        def sweep() -> None:
            with self._changing:
                record = self._records.get(manifest_digest)
                if record is None:
                    return
                gone = record.content_keys[depth:]
                kept = msgspec.structs.replace(record, content_keys=record.content_keys[:depth])
                self._records.put(kept)
                used = {key for other in self._records.all() for key in other.content_keys}
            store.remove([key for key in gone if key not in used])

        await trio.to_thread.run_sync(sweep)

    def forget_index(self, digest: bytes) -> None:
        """Delete an index that no image has. Blocks. Raises StoreError."""
        self._indexes.remove(digest)

    def tree_of(self, index: FileIndex) -> Path:
        """The EROFS image of an index, as a file of its own. Blocks. Raises StoreError."""
        return self._indexes.tree(index.digest, memoryview(index.tree.buffer))

    def path_of(self, index: FileIndex) -> Path:
        """Where an index that was kept is. Raises StoreError if it is gone."""
        path = self._indexes.get(index.digest)
        if path is None:
            raise StoreError(f"the file index sha256:{index.digest.hex()} is gone from the disk")
        return path

    def disown(self, manifest_digest: str, index_digest: bytes) -> None:
        """Forget an index that lies about its image."""
        try:
            with self._changing:
                self._records.remove(manifest_digest)
                self._indexes.remove(index_digest)
        except FirstByteError as error:
            log.error("a wrong file index stays on disk: %s", error)

    def _open(self, digest: bytes) -> FileIndex | None:
        path = self._indexes.get(digest)
        if path is None:
            return None
        index = self._opened.get(digest)
        if index is None:
            index = FileIndex.open(path, self._checked.get(digest))
            if index.digest != digest:
                raise IntegrityError(f"{path} holds another index than its name says")
            self._opened[digest] = index
            self._checked[digest] = index.state
        return index


def _pack_of(record: ImageRecord) -> Descriptor | None:
    if not record.pack:
        return None
    return Descriptor(media_type=PACK_TYPE, digest=record.pack, size=record.pack_size)


def _resolved(record: ImageRecord) -> ResolvedImage | None:
    """The image of a record, or None if it makes no sense."""
    name = record.reference
    try:
        manifest = parse(record.manifest, "", name)
        if not isinstance(manifest, Manifest):
            return None
        check_image(manifest, name)
        config = parse_config(record.config, f"the configuration of {name}")
    except FirstByteError as error:
        log.warning("the record of %s is not used: %s", name, error)
        return None
    return ResolvedImage(name, manifest.descriptor, manifest, config, record.config)
