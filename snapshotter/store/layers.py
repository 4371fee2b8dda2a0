"""The chunk store: one sparse raw file and one presence bitmap per layer.

    <root>/lock                      held while a process owns the store
    <root>/layers/<content key>/raw      raw space, holes where nothing is present
                               /present  see `presence`
                               /diff_id  32 bytes: what all of raw space was found to hash to

Keyed by content (`LayerTable.content_key`), so images share layers.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import threading
from typing import TYPE_CHECKING

from snapshotter.store.cache import VerifiedCache
from snapshotter.store.durable import make_directory
from snapshotter.store.errors import StoreError, StoreLockedError, store_error
from snapshotter.store.layer import StoredLayer

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path
    from types import TracebackType

    from index.tables import LayerTable

log = logging.getLogger(__name__)

GONE_PREFIX = ".gone-"
"""Starts the names of layers' directories that are being deleted."""


class LayerStore:
    """All layers of one node. Thread-safe; one process owns a root at a time."""

    def __init__(self, root: Path) -> None:
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
        lock_path = root / "lock"
        try:
            self._owner = os.open(lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise store_error(error, lock_path, "cannot open") from error
        try:
            fcntl.flock(self._owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._owner)
            raise StoreLockedError(
                f"{root} is in use by another process",
                hint="stop the other firstbyte, or give this one a --root of its own",
            ) from error
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
                layer = self._layers[key] = StoredLayer(directory, table, key, self._cache)
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

    def remove(self, keys: Iterable[bytes]) -> None:
        """Delete layers, by content key, but those that somebody has open.

        Blocks for as long as the disk takes. Raises StoreError.
        """
        self.flush()  # closes the files of those that nobody has open
        with self._lock:  # renamed within it, so that nobody opens one that is about to go
            for key in keys:
                directory = self._directory / key.hex()
                if key not in self._layers and directory.exists():
                    directory.rename(self._directory / f"{GONE_PREFIX}{directory.name}")
        self._discard_gone()

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
