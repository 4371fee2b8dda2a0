"""How open images are shown: by FUSE alone, by the kernel's EROFS on top of it, or without us.

Every view is in the FUSE mount, where the daemon serves its tree, and beside it are the flat files
that the kernel's EROFS takes: its EROFS image, and the raw space of each layer. EROFS mounts are
made when somebody wants one, at `<state>/views`. Of layers that are here and proven by then the
kernel gets the store's own files instead, and asks us for nothing of theirs for as long as the
mount lives. When an image is fully local, those who come from then on get a mount that needs us for
nothing at all; the others keep what they have.

What the kernel reads from the disk nobody sees, and nobody refuses: see `Showing.directory` and
`Showing.refuse`.
"""

from __future__ import annotations

import enum
import logging
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING

import trio

from snapshotter.daemon.kernel import Kernel
from snapshotter.daemon.records import NATIVE
from snapshotter.fetch.errors import FetchError
from snapshotter.fuse import session
from snapshotter.fuse.flat import FlatFile
from snapshotter.fuse.view import View
from snapshotter.mounts import syscalls
from snapshotter.mounts.erofs import mount_erofs
from snapshotter.mounts.errors import MountError
from snapshotter.mounts.loop import mount_erofs_on_loops
from snapshotter.mounts.table import mount_at
from snapshotter.store.layer import held

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from index.errors import FirstByteError
    from index.file import FileIndex
    from index.tables import LayerTable
    from snapshotter.daemon.places import Places
    from snapshotter.daemon.records import Records, ViewRecord
    from snapshotter.fetch.layer import LazyLayer
    from snapshotter.fuse.view import Data, RawSpace, Tree, Views

    Mounter = Callable[[Path, Sequence[Path], Path], None]

log = logging.getLogger(__name__)

_IMAGE = ".erofs"  # ends the name of the flat file with a view's EROFS image
_RAW = ".raw"  # ends the name of the flat file with a layer's raw space
_NATIVE = ".native"  # ends the name of a mount on the store's own files


class _CannotError(MountError):
    """This kernel cannot, whichever image it is."""


class Mode(enum.Enum):
    """Who is between a container and its files."""

    FUSE = "fuse"  # the daemon, for everything
    EROFS = "erofs"  # the kernel; the daemon for what is neither in its caches nor on the disk
    NATIVE = NATIVE  # the kernel and the disk


class SharedSpace:
    """A layer's raw space, as those images have it that are open: any of them will do."""

    def __init__(self) -> None:
        self.layers: list[LazyLayer] = []

    def read_now(self, offset: int, length: int) -> Data | None:
        for layer in self.layers[1:]:
            layer.note(offset, length)
        return self.layers[0].read_now(offset, length)

    async def read(self, offset: int, length: int) -> Data:
        while True:
            layer = self.layers[0]
            try:
                return await layer.read(offset, length)
            except FetchError:
                if not self.layers or layer is self.layers[0]:
                    raise  # else its image was closed meanwhile, and another one has the layer


class Shown:
    """One image in the FUSE mount. Made by `Showing`.

    `why` says in one line why it is not shown in a better mode, or is empty. `from_disk` is how
    many layers the kernel's EROFS reads from the store's files, in the mount that has its tree here
    (mode EROFS) and that this process has made.
    """

    def __init__(
        self, index: FileIndex, view: View, flat: View, layers: Sequence[LazyLayer]
    ) -> None:
        self.index = index
        self.view = view
        self.flat = flat
        self.name = view.name.decode()
        self.layers = layers
        self.mounted: dict[Mode, Path] = {}
        self.holding = ExitStack()
        self.why = ""
        self.from_disk = 0
        self.lock = trio.Lock()

    @property
    def mode(self) -> Mode:
        """The best mode that somebody has asked for so far."""
        return next((mode for mode in (Mode.NATIVE, Mode.EROFS) if mode in self.mounted), Mode.FUSE)


class Showing:
    """All images that are shown. For the trio thread."""

    def __init__(
        self,
        places: Places,
        views: Views,
        records: Records,
        *,
        write_tree: Callable[[FileIndex], Path],
    ) -> None:
        """`write_tree` gives an index's EROFS image as a file of its own. It blocks."""
        self._places = places
        self._views = views
        self._records = records
        self._write_tree = write_tree
        self.kernel = Kernel(places, views)
        self._changing = trio.Lock()  # images share flat files, and come and go meanwhile
        self._spaces: dict[str, tuple[View, SharedSpace]] = {}  # by the flat file's name

    @property
    def fuse_requests(self) -> int:
        """What the kernel has asked of this process."""
        return self._views.requests

    async def add(
        self,
        name: str,
        reference: str,
        index: FileIndex,
        layers: Sequence[LazyLayer],
        record: Callable[[list[str]], ViewRecord],
    ) -> Shown:
        """Show an image in the FUSE mount, as a tree and as flat files.

        `record` makes what a successor has to know, given the names; it is on disk when this
        returns. Raises DaemonError.
        """
        async with self._changing:
            return await self._add(name, reference, index, layers, record)

    async def _add(
        self,
        name: str,
        reference: str,
        index: FileIndex,
        layers: Sequence[LazyLayer],
        record: Callable[[list[str]], ViewRecord],
    ) -> Shown:
        raw_names = [_raw_name(table) for table in index.layers]
        names = list(dict.fromkeys([name, name + _IMAGE, *raw_names]))
        slots = await trio.to_thread.run_sync(self._records.open_view, name, record(names))

        def view(entry: str, image: Tree, spaces: Sequence[RawSpace], raw_size: int = 0) -> View:
            made = View(
                name=entry.encode(),
                slot=slots[entry],
                reference=reference,
                image=image,
                layers=spaces,
                raw_size=raw_size,
            )
            self._views.add(made)
            return made

        tree = view(name, index.tree, layers, sum(table.raw_size for table in index.layers))
        buffer = index.tree.buffer
        flat = view(name + _IMAGE, FlatFile(len(buffer), buffer), ())
        for entry, layer in zip(raw_names, layers, strict=True):
            if entry not in self._spaces:
                space = SharedSpace()
                raw = view(entry, FlatFile(layer.table.raw_size), [space])
                self._spaces[entry] = raw, space
            self._spaces[entry][1].layers.append(layer)
        return Shown(index, tree, flat, layers)

    async def directory(
        self, shown: Shown, *, local: bool, seen: bool, wanted: Mode | None
    ) -> tuple[Mode, Path]:
        """Where to find an image, in the mode that is `wanted` or else in the best there is.

        `local` says that all of it is on this node, and proven. `seen` keeps the kernel from
        reading single layers from the disk, because its reads are to be recorded. Raises MountError
        if it cannot be shown in the mode that is wanted.
        """
        async with shown.lock:
            if wanted is not None:
                return wanted, await self._directory(shown, wanted, seen=seen)
            shown.why = "" if local else "not all of it is on this node yet"
            for mode in (Mode.NATIVE, Mode.EROFS) if local else (Mode.EROFS,):
                try:
                    directory = await self._directory(shown, mode, seen=seen)
                except _CannotError as error:
                    shown.why = str(error)
                except MountError as error:
                    log.warning("%s cannot be shown in mode %s: %s", shown.name, mode.value, error)
                    shown.why = str(error)
                else:
                    if mode is Mode.EROFS and (count := shown.from_disk):
                        shown.why += f"; {count} of {len(shown.layers)} layers come from the disk"
                    return mode, directory
            return Mode.FUSE, await self._directory(shown, Mode.FUSE, seen=seen)

    async def flat_files(self, shown: Shown) -> Sequence[Path]:
        """What the kernel's EROFS reads the layers of an image from, while not all of it is here.

        Nothing if this kernel cannot. Raises MountError, OSError or trio.TooSlowError if that
        cannot be found out.
        """
        try:
            await self._mounter(Mode.EROFS, len(shown.layers))
        except _CannotError:
            return ()
        return [self._flat_file(layer) for layer in shown.layers]

    async def remove(self, shown: Shown) -> None:
        """Stop showing an image; those who still use a mount of the kernel's keep it, but nobody
        answers what it asks."""
        async with self._changing:
            for mode in (Mode.NATIVE, Mode.EROFS):  # a predecessor may have made them
                await trio.to_thread.run_sync(_unmount, self._mount_point(shown, mode))
            await self._remove(shown)

    async def _remove(self, shown: Shown) -> None:
        shown.holding.close()
        gone = [shown.view, shown.flat]
        for layer in shown.layers:
            entry = _raw_name(layer.table)
            flat, space = self._spaces[entry]
            space.layers.remove(layer)
            if not space.layers:
                del self._spaces[entry]
                gone.append(flat)
        await trio.to_thread.run_sync(self._records.close_view, shown.name)
        for view in gone:
            self._views.remove(view)
            session.forget_name(view.name)

    def refuse(self, shown: Shown, error: FirstByteError) -> None:
        """Let every read of an image fail from now on, as far as the kernel asks.

        It does not ask for what it has in memory, nor for layers that it reads from the disk. Their
        bytes were proven to be those that the image names; what its file index may have lied about
        is where in the tree they are, and the tree is asked of us.
        """
        shown.view.refusal = shown.flat.refusal = error
        for layer in shown.layers:
            flat, space = self._spaces[_raw_name(layer.table)]
            if all(other in shown.layers for other in space.layers):
                flat.refusal = error

    async def _directory(self, shown: Shown, mode: Mode, *, seen: bool) -> Path:
        if mode is Mode.FUSE:
            return self._places.mount / shown.name
        if mode not in shown.mounted:
            mount = await self._mounter(mode, len(shown.layers))
            point = self._mount_point(shown, mode)
            if mode is Mode.NATIVE:
                await self._mount_native(shown, mount, point)
            else:
                await self._mount_erofs(shown, point, seen=seen)
            shown.mounted[mode] = point
        return shown.mounted[mode]

    async def _mount_native(self, shown: Shown, mount: Mounter, point: Path) -> None:
        image = await trio.to_thread.run_sync(self._write_tree, shown.index)
        devices = [layer.stored.raw_path for layer in shown.layers]
        with ExitStack() as holding:  # the kernel would see zeros where something was evicted
            holding.enter_context(held(layer.stored for layer in shown.layers))
            if not all(layer.stored.complete for layer in shown.layers):
                raise MountError("some of it is not on this node any more")
            await trio.to_thread.run_sync(_mount, mount, image, devices, point)
            shown.holding.push(holding.pop_all())

    async def _mount_erofs(self, shown: Shown, point: Path, *, seen: bool) -> None:
        """The tree is asked of us, and what is not proven to be here."""
        can = await self.kernel.capabilities()
        with ExitStack() as holding:
            on_disk: Sequence[LazyLayer] = ()
            if not (seen or can.file_backed):
                on_disk = await trio.to_thread.run_sync(_hold_proven, shown.layers, holding)
            devices = [
                layer.stored.raw_path if layer in on_disk else self._flat_file(layer)
                for layer in shown.layers
            ]
            # Above FUSE, `direct` is the worst there is: see `mounts/erofs.py`.
            direct = len(on_disk) == len(devices) and not can.direct
            mount = partial(mount_erofs, direct=direct)
            image = self._places.mount / f"{shown.name}{_IMAGE}"
            if await trio.to_thread.run_sync(_mount, mount, image, devices, point):
                shown.from_disk = len(on_disk)
                shown.holding.push(holding.pop_all())
                log.info(
                    "%s is mounted: %d of %d layers come from the disk",
                    shown.view.reference,
                    len(on_disk),
                    len(devices),
                )
            # What a predecessor's mount reads from the disk, the kernel knows: `store/leases.py`.

    async def _mounter(self, mode: Mode, layers: int) -> Mounter:
        """How to mount in a mode. Raises _CannotError if this kernel cannot."""
        can = await self.kernel.capabilities()
        if not layers:
            raise _CannotError("it has no layers")
        if mode is Mode.EROFS:
            if reason := can.fuse_backed or can.failed_reads:
                raise _CannotError(reason)
            if layers > can.layers:
                raise _CannotError(f"the kernel takes {can.layers} layers, it has {layers}")
        elif not (can.file_backed or can.failed_reads) and layers <= can.layers:
            return partial(mount_erofs, direct=not can.direct)
        elif can.loop:
            raise _CannotError(can.loop)
        else:
            return mount_erofs_on_loops
        return mount_erofs

    def _flat_file(self, layer: LazyLayer) -> Path:
        return self._places.mount / _raw_name(layer.table)

    def _mount_point(self, shown: Shown, mode: Mode) -> Path:
        return self._places.views / (shown.name + (_NATIVE if mode is Mode.NATIVE else ""))


def _raw_name(table: LayerTable) -> str:
    return table.content_key.hex() + _RAW


def _hold_proven(layers: Sequence[LazyLayer], holding: ExitStack) -> Sequence[LazyLayer]:
    """Those of the layers of which all is here, and is what the image names. Of them nothing is
    evicted until `holding` is closed."""
    found = []
    for layer in layers:
        with ExitStack() as stack:
            stack.enter_context(held([layer.stored]))
            if layer.stored.proven:
                found.append(layer)
                holding.push(stack.pop_all())
    return found


def _mount(mount: Mounter, image: Path, devices: Sequence[Path], point: Path) -> bool:
    """Mount an EROFS image; False if a predecessor has done it."""
    if mount_at(point) is not None:
        return False
    point.mkdir(parents=True, mode=0o700, exist_ok=True)
    try:
        mount(image, devices, point)
    except BaseException:
        point.rmdir()
        raise
    return True


def _unmount(point: Path) -> None:
    if not point.exists():
        return
    try:
        if mount_at(point) is not None:
            syscalls.unmount(point, detach=True)
        point.rmdir()
    except (MountError, OSError) as error:
        log.warning("%s is left: %s", point, error)
