"""The chunk store: one sparse raw file and one presence bitmap per layer.

    <root>/lock                      held while a process owns the store
    <root>/layers/<content key>/raw      raw space, holes where nothing is present
                               /present  see `presence`
                               /recent   see `recent`
                               /diff_id  32 bytes: what all of raw space was found to hash to

Keyed by content (`LayerTable.content_key`), so images share layers. A layer's directory is modified
(its mtime) when the layer is used: when it is opened or closed, and while it is open from time to
time.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import threading
from contextlib import contextmanager, suppress
from heapq import nsmallest
from typing import TYPE_CHECKING

from index.tables import CHUNK_SIZE
from snapshotter.store.cache import VerifiedCache
from snapshotter.store.durable import make_directory
from snapshotter.store.errors import StoreError, StoreLockedError, store_error
from snapshotter.store.layer import StoredLayer
from snapshotter.store.leases import is_open_elsewhere
from snapshotter.store.space import UNBOUNDED, Space

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Sequence
    from pathlib import Path
    from types import TracebackType

    from index.tables import LayerTable
    from snapshotter.store.space import Bounds

log = logging.getLogger(__name__)

GONE_PREFIX = ".gone-"
"""Starts the names of layers' directories that are being deleted."""


def own(root: Path) -> int:
    """Take possession of a root, until the descriptor that this returns is closed.

    Raises StoreLockedError if another process has it, StoreError if the disk refuses.
    """
    path = root / "lock"
    try:
        owner = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise store_error(error, path, "cannot open") from error
    try:
        fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(owner)
        raise StoreLockedError(
            f"{root} is in use by another process",
            hint="stop the other firstbyte, or give this one a --root of its own",
        ) from error
    return owner


class LayerStore:
    """All layers of one node. Thread-safe; one process owns a root at a time.

    `space` is how much of the disk the store takes, and may take.
    """

    def __init__(self, root: Path, bounds: Bounds = UNBOUNDED) -> None:
        """Take possession of `root`, created if missing.

        Raises StoreLockedError if another process has it, StoreError if the disk refuses.
        """
        self.root = root
        self._directory = root / "layers"
        self._cache = VerifiedCache()
        self._layers: dict[bytes, StoredLayer] = {}
        self._lock = threading.Lock()
        self._flushing = threading.Lock()
        self._closed = False
        make_directory(self._directory)
        self._owner = own(root)
        self.space = Space(root, bounds)
        try:
            self._discard_gone()
        except StoreError as error:
            log.warning("%s", error)

    def open(self, table: LayerTable) -> StoredLayer:
        """The layer with this content; the same object for everybody who has it open.

        Each caller calls its `close` once. Raises StoreError.
        """
        key = table.content_key
        with self._lock:
            layer = self._layers.get(key)
            if layer is None:
                directory = self._directory / key.hex()
                layer = self._layers[key] = StoredLayer(
                    directory, table, key, self._cache, self.space
                )
                _touch(directory)
            else:
                layer.retain()
            return layer

    def open_all(self, tables: Sequence[LayerTable]) -> list[StoredLayer]:
        """`open` for all layers of an image, or for none. Raises StoreError."""
        opened: list[StoredLayer] = []
        try:
            for table in tables:
                opened.append(self.open(table))  # noqa: PERF401  (those before must be closed)
        except BaseException:
            for layer in opened:
                layer.close()
            raise
        return opened

    def usage_of(self, key: bytes) -> int:
        """Bytes of disk that the layer with this content takes, open or not."""
        try:
            with os.scandir(self._directory / key.hex()) as files:
                return sum(512 * file.stat().st_blocks for file in files)
        except FileNotFoundError:
            return 0

    def remove(self, keys: Iterable[bytes]) -> list[bytes]:
        """Delete layers, by content key, but those that somebody has open: here, or a mount of the
        kernel's. Returns which were there, and are gone.

        Blocks for as long as the disk takes. Raises StoreError.
        """
        self.flush()  # closes the files of those that nobody has open
        gone, freed = [], 0
        with self._lock:  # renamed within it, so that nobody opens one that is about to go
            for key in keys:
                directory = self._directory / key.hex()
                if key in self._layers or not directory.exists():
                    continue
                if is_open_elsewhere(directory / "raw"):
                    log.info("layer %s stays: a mount of the kernel's uses it", directory.name)
                    continue
                freed += self.usage_of(key)
                directory.rename(self._directory / f"{GONE_PREFIX}{directory.name}")
                gone.append(key)
        self._discard_gone()
        self.space.gave_back(freed)
        return gone

    # --- making room ---

    def open_keys(self) -> set[bytes]:
        """The content keys of the layers that are open."""
        with self._lock:
            return {key for key, layer in self._layers.items() if not layer.unused}

    def touch_open(self) -> None:
        """Note that the layers that are open are in use. Blocks."""
        for key in self.open_keys():
            _touch(self._directory / key.hex())

    def evict_chunks(self, size: int) -> list[bytes]:
        """Free so many bytes, or all that can be, by dropping chunks of layers that are open: those
        that were not used for longest, and what starts need last.

        Returns the content keys of the layers that have lost something. Blocks. Raises StoreError.
        """
        lost = []
        with self._retained() as layers:
            left, tried = size, set[StoredLayer]()
            while left > 0:
                coldest = _coldest([one for one in layers if one not in tried], left)
                if not coldest:
                    break
                for layer, chunks in coldest.items():
                    freed = layer.evict(chunks)
                    left -= freed
                    if freed:
                        lost.append(layer.key)
                    else:
                        tried.add(layer)
        return list(dict.fromkeys(lost))

    @contextmanager
    def _retained(self) -> Iterator[list[StoredLayer]]:
        """The layers that are open, and stay so while the block runs."""
        with self._lock:
            layers = [layer for layer in self._layers.values() if not layer.unused]
            for layer in layers:
                layer.retain()
        try:
            yield layers
        finally:
            for layer in layers:
                layer.close()

    def _discard_gone(self) -> None:
        for directory in self._directory.glob(f"{GONE_PREFIX}*"):
            try:
                shutil.rmtree(directory)
            except OSError as error:
                raise store_error(error, directory, "cannot remove") from error

    def flush(self) -> None:
        """Make all that was written durable, then close the files of layers nobody has open.

        Blocks for as long as the disk takes. Raises the first StoreError after trying all.
        """
        problem: StoreError | None = None
        with self._flushing:
            with self._lock:
                layers = list(self._layers.items())
            for key, layer in layers:
                try:
                    layer.flush()
                except StoreError as error:
                    problem = problem or error
                with self._lock:
                    if layer.unused and not layer.dirty_bytes:
                        del self._layers[key]
                        layer.release()
                        _touch(self._directory / key.hex())
        if problem is not None:
            raise problem

    @property
    def dirty_bytes(self) -> int:
        """Bytes written since they were last made durable."""
        with self._lock:
            return sum(layer.dirty_bytes for layer in self._layers.values())

    def disk_usage(self) -> int:
        """Bytes of disk that all layers take, open or not."""
        return sum(
            512 * file.stat().st_blocks for file in self._directory.glob("*/*") if file.is_file()
        )

    def close(self) -> None:
        """Flush, close every layer, whoever has it open, and give the root up. Idempotent."""
        if self._closed:
            return
        self._closed = True
        try:
            self.flush()
        except StoreError as error:
            log.warning("on closing the store: %s", error)
        with self._lock:
            for layer in self._layers.values():
                layer.release()
            self._layers.clear()
        os.close(self._owner)

    def __enter__(self) -> LayerStore:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _coldest(layers: Collection[StoredLayer], size: int) -> dict[StoredLayer, list[int]]:
    """The coldest chunks of `layers`, of about `size` bytes in all, or all that there are."""
    numbered = list(layers)
    candidates = (
        (needed, used, number, chunk)
        for number, layer in enumerate(numbered)
        for needed, used, chunk in layer.candidates()
    )
    coldest: dict[StoredLayer, list[int]] = {}
    for _, _, number, chunk in nsmallest(-(-size // CHUNK_SIZE), candidates):
        coldest.setdefault(numbered[number], []).append(chunk)
    return coldest


def _touch(directory: Path) -> None:
    """A layer is used now. It is not worth an error."""
    with suppress(OSError):
        os.utime(directory)
