"""The ten calls of a containerd snapshotter, whose image layers may be served lazily.

A lazy layer has no directory here: it is a row that says which layers of which image it stands
for. What lies between it and a container are ordinary directories, as of the overlayfs
snapshotter; below it, one directory of the FUSE mount shows all lazy layers merged.

Nothing is half there after a crash. A directory is made under a temporary name, synced, renamed to
its id, and only then its row is committed; a row is deleted before its directory. So what a crash
leaves is a directory without a row, and `recover` deletes those.
"""

from __future__ import annotations

import collections
import logging
from contextlib import ExitStack
from typing import TYPE_CHECKING, TypeVar, TypeVarTuple

import msgspec
import trio

from index.errors import FirstByteError
from snapshotter.containerd.database import Database
from snapshotter.containerd.directories import Directories
from snapshotter.containerd.errors import AlreadyExistsError, UnavailableError
from snapshotter.containerd.fallbacks import Fallback, Fallbacks
from snapshotter.containerd.filters import compile_filters
from snapshotter.containerd.idmapped import IdmappedDirectories
from snapshotter.containerd.labels import REFERENCE, TARGET, image_labels, lazy_labels
from snapshotter.containerd.lazy import LayerPlace, LazyImages, Refused
from snapshotter.containerd.metadata import Chain, Metadata, Record
from snapshotter.containerd.overlay import (
    check_path,
    id_mapping,
    kernel_options,
    overlay_mounts,
    root_of,
)
from snapshotter.containerd.snapshots import Info, Kind, Mount, Usage
from snapshotter.containerd.usage import tree_usage
from snapshotter.store.durable import make_directory
from snapshotter.store.errors import StoreError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

Result = TypeVar("Result")
Arguments = TypeVarTuple("Arguments")

log = logging.getLogger(__name__)

_THREADS = 8  # at work for containerd at once, so that readers of files find free ones; a guess
_RELEASE = 60.0  # seconds in which an image is let go although the caller gave up; a guess
_NOTHING = Usage(inodes=0, size=0)


class SnapshotterStats(msgspec.Struct, frozen=True):
    """What snapshots there are now, and what was refused since the start.

    `containers` are writable snapshots that are no layers being unpacked. `fallbacks` counts layers
    that were unpacked because their image is not served lazily, by the kind of the reason.
    """

    lazy_layers: int
    ordinary_layers: int
    containers: int
    views: int
    fallbacks: dict[str, int]


class Snapshotter:
    """The snapshots below one root directory. Call `recover` first, and `close` at the end.

    Calls run side by side; of two that want the same name, one gets AlreadyExistsError. They raise
    SnapshotErrors as containerd expects them, and StoreError if the disk fails. A cancelled call
    has either done all of its work or none.
    """

    def __init__(self, root: Path, lazy: LazyImages, idmapped: Path) -> None:
        """Open `<root>/containerd`, or make it. Raises StoreError.

        In the directory `idmapped` are mounts for containers in user namespaces.
        """
        home = root.absolute() / "containerd"
        check_path(home)
        make_directory(home)  # by itself, because its parents get the usual mode
        self._lazy = lazy
        self._directories = Directories(home / "snapshots")
        self._idmapped = IdmappedDirectories(idmapped.absolute())
        self._database = Database(home / "metadata.db")
        self._metadata = Metadata(self._database)
        self._fallbacks = Fallbacks(self._database)
        self._options = kernel_options()
        self._threads = trio.CapacityLimiter(_THREADS)
        self._refused: collections.Counter[str] = collections.Counter()

    def close(self) -> None:
        """Release the metadata; containers go on."""
        self._database.close()

    def unmount(self) -> None:
        """Take down what is mounted for snapshots. It blocks; containers go on."""
        self._idmapped.close()

    async def recover(self) -> None:
        """Clean up after a crash, and say which images have snapshots."""
        records = await self._in_thread(self._metadata.all)
        for record in records:
            if record.place is not None:
                self._lazy.retain(record.place.image, record.place.depth)
        for name in await self._in_thread(self._delete_unknown):
            log.info("deleted %s: it belongs to no snapshot", name)
        ordinary = {record.id: record.info.name for record in records if record.place is None}
        for lost in await self._in_thread(self._directories.missing, ordinary):
            # No crash does this, so it is for a person to decide.
            log.error("the files of snapshot %s (%d) are lost", ordinary[lost], lost)

    async def stats(self) -> SnapshotterStats:
        counts = await self._in_thread(self._metadata.counts)
        return SnapshotterStats(
            lazy_layers=counts.lazy_layers,
            ordinary_layers=counts.ordinary_layers,
            containers=counts.containers,
            views=counts.views,
            fallbacks=dict(self._refused),
        )

    async def fallbacks(self) -> Sequence[Fallback]:
        """The images that were not served lazily, most recent first."""
        return await self._in_thread(self._fallbacks.latest)

    async def prepare(self, key: str, parent: str, labels: Mapping[str, str]) -> Sequence[Mount]:
        """A writable snapshot; or, for a layer that is served lazily, AlreadyExistsError."""
        if (target := labels.get(TARGET)) and await self._add_lazy(target, key, parent, labels):
            raise AlreadyExistsError(f"target snapshot {target}: already exists")
        return await self._create(Kind.ACTIVE, key, parent, labels)

    async def view(self, key: str, parent: str, labels: Mapping[str, str]) -> Sequence[Mount]:
        """A read-only snapshot."""
        return await self._create(Kind.VIEW, key, parent, labels)

    async def mounts(self, key: str) -> Sequence[Mount]:
        """The mounts of an active snapshot or a view, once more."""
        record, chain = await self._in_thread(self._metadata.chain_of, key)
        lowers = await self._lowers(chain)

        def show() -> Sequence[Mount]:
            shown = self._idmapped.lowers(record.id, lowers, id_mapping(record.info.labels))
            directory = self._directories.path(record.id)
            return overlay_mounts(record.info.kind, directory, shown, self._options)

        return await self._in_thread(show)

    async def commit(self, name: str, key: str, labels: Mapping[str, str], parent: str) -> None:
        """Make an active snapshot immutable, under a new name and with these labels only."""
        record = await self._in_thread(self._metadata.record, key)
        usage = _NOTHING
        if record.info.kind is Kind.ACTIVE:
            usage = await self._scan(record)

        def commit() -> None:
            self._metadata.commit(name, key, labels, parent, usage)
            self._idmapped.remove(str(record.id))  # it has no mounts any more

        await self._in_thread(commit)

    async def remove(self, key: str) -> None:
        """Forget a snapshot; `cleanup` deletes its directory."""

        def remove() -> Record:
            record = self._metadata.remove(key)
            self._idmapped.remove(str(record.id))
            return record

        place = (await self._in_thread(remove)).place
        if place is not None:
            await self._release(place)

    async def stat(self, key: str) -> Info:
        return (await self._in_thread(self._metadata.record, key)).info

    async def update(self, name: str, labels: Mapping[str, str], fieldpaths: Sequence[str]) -> Info:
        return await self._in_thread(self._metadata.update, name, labels, fieldpaths)

    async def list(self, filters: Sequence[str]) -> Sequence[Info]:
        def matching() -> Sequence[Info]:
            matches = compile_filters(filters)
            found = self._metadata.all(matches.label)
            return [record.info for record in found if matches(record.info)]

        return await self._in_thread(matching)

    async def usage(self, key: str) -> Usage:
        """What a snapshot takes on disk without those below it.

        Content that lazy snapshots share is counted for one of them, so that sums are right.
        """
        record = await self._in_thread(self._metadata.record, key)
        if record.info.kind is Kind.ACTIVE:
            return await self._scan(record)
        if record.place is None:
            return record.usage
        if not await self._in_thread(self._metadata.counts_for_content, record):
            return _NOTHING
        return Usage(inodes=0, size=await self._lazy.disk_usage(record.place.content_key))

    async def cleanup(self) -> None:
        """Delete the directories of removed snapshots."""
        await self._in_thread(self._delete_unknown)

    async def _add_lazy(
        self, target: str, key: str, parent: str, labels: Mapping[str, str]
    ) -> bool:
        """Add a layer as a lazy snapshot; False, and noted down, if its image is not lazy."""
        await self._in_thread(self._metadata.chain_under, parent)  # before the network is asked
        image = image_labels(labels)
        if image is None:
            reason = "containerd sends no image labels: see docs/containerd.md"
            await self._note(target, Refused(labels.get(REFERENCE, ""), "", reason, "no-labels"))
            return False
        async with self._lazy.placing(image) as place:
            if isinstance(place, Refused):
                await self._note(target, place)
                return False
            # containerd finds it by label and parent, so any name will do. The chain ID tells a
            # person more than the key; it is taken only if the layers were put on another parent.
            names = (target, f"{target} {key}")
            given = lazy_labels(labels, place.image)
            if await self._in_thread(self._metadata.create_lazy, names, parent, given, place):
                self._lazy.retain(place.image, place.depth)
            return True

    async def _note(self, target: str, refused: Refused) -> None:
        self._refused[refused.kind] += 1
        if await self._in_thread(self._fallbacks.add, refused):
            log.warning(
                "%s is not served lazily (%s): %s",
                refused.reference or target,
                refused.kind,
                refused.reason,
            )

    async def _release(self, place: LayerPlace) -> None:
        with trio.move_on_after(_RELEASE, shield=True) as scope:  # the row is gone in any case
            try:
                await self._lazy.release(place.image, place.depth)
            except FirstByteError as error:
                log.warning("cannot let go of image %s: %s", place.image, error)
        if scope.cancelled_caught:
            log.warning("image %s was not let go within %.0f s", place.image, _RELEASE)

    async def _create(
        self, kind: Kind, key: str, parent: str, labels: Mapping[str, str]
    ) -> Sequence[Mount]:
        chain = await self._in_thread(self._metadata.chain_under, parent)
        lowers = await self._lowers(chain)

        def create() -> Sequence[Mount]:
            mapping = id_mapping(labels)
            with ExitStack() as stack:
                try:
                    owner = root_of(mapping) if mapping else _owner_of_nearest(chain, lowers)
                    shown = stack.enter_context(self._idmapped.draft(lowers, mapping))
                except UnavailableError:
                    self._metadata.chain_under(parent)  # removed meanwhile?
                    raise
                writable = kind is Kind.ACTIVE
                draft = stack.enter_context(self._directories.draft(owner, writable=writable))

                def settle(created: int) -> None:
                    draft.settle(created)
                    shown.settle(created)

                created = self._metadata.create(
                    kind, key, parent, labels, planned=chain, settle=settle
                )
            directory = self._directories.path(created)
            return overlay_mounts(kind, directory, shown.lowers, self._options)

        return await self._in_thread(create)

    async def _scan(self, record: Record) -> Usage:
        """What an active snapshot takes now."""
        try:
            return await self._in_thread(tree_usage, self._directories.layer(record.id))
        except StoreError:
            await self._in_thread(self._metadata.record, record.info.name)  # removed meanwhile?
            raise

    async def _lowers(self, chain: Chain) -> Sequence[Path]:
        """The directories below a snapshot, nearest first."""
        lowers = [self._directories.layer(snapshot) for snapshot in chain.ordinary]
        if chain.depth:
            try:
                lower = await self._lazy.lower(chain.image, chain.depth)
                check_path(lower)
            except FirstByteError as error:
                raise UnavailableError(error.message, hint=error.hint) from error
            lowers.append(lower)
        return lowers

    def _delete_unknown(self) -> Sequence[str]:
        """Delete all directories that have no row; the names of those that are gone."""
        names = self._directories.names()  # before the rows: see Metadata.ids
        mapped = self._idmapped.names()
        known = {str(snapshot) for snapshot in self._metadata.ids()}
        for name in mapped - known:
            self._idmapped.remove(name)
        return [name for name in sorted(names - known) if self._directories.delete(name)]

    async def _in_thread(
        self, work: Callable[[*Arguments], Result], *arguments: *Arguments
    ) -> Result:
        return await trio.to_thread.run_sync(work, *arguments, limiter=self._threads)


def _owner_of_nearest(chain: Chain, lowers: Sequence[Path]) -> tuple[int, int] | None:
    """The (uid, gid) that the root directory has so far.

    In images it is root's, whatever they say: containerd does not heed what layers say of it.
    """
    if not chain.ordinary:
        return None
    directory = lowers[0]
    try:
        status = directory.stat()
    except OSError as error:
        raise UnavailableError(f"cannot look at {directory}: {error.strerror}") from error
    return status.st_uid, status.st_gid
