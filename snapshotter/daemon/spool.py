"""Raw space on its way to the store, while nobody can say yet what its chunks must hash to.

An image without a file index is read once from end to end to build one. What comes out of that is
the whole image, so it is kept: first in files without a name, then, when the layer tables exist,
verified chunk by chunk into the store.
"""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING

from index.errors import FirstByteError
from index.tables import CHUNK_SIZE
from snapshotter.store.errors import StoreFullError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from snapshotter.store.layer import StoredLayer
    from snapshotter.store.space import Space

log = logging.getLogger(__name__)


class Spool:
    """One nameless file a layer, gone with the process however that ends.

    A disk that refuses, or that is to stay free, costs the spooled layer, not the mount: it is
    fetched again.
    """

    def __init__(self, folder: Path, space: Space) -> None:
        self._folder = folder
        self._space = space
        self._reserved = 0
        self._files: dict[int, int] = {}

    @property
    def empty(self) -> bool:
        """Whether nothing waits to be poured."""
        return not self._files

    def writer(self, layer: int) -> Callable[[bytes], None]:
        """What takes a layer's raw space, in order, in any one thread at a time."""
        self._files[layer] = os.open(self._folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)

        def write(raw: bytes) -> None:
            if layer not in self._files:
                return
            try:
                if raw and not self._space.reserve(len(raw), len(raw)):
                    raise StoreFullError("the store has reached its limit")
                self._reserved += len(raw)
                view = memoryview(raw)
                while view:
                    view = view[os.write(self._files[layer], view) :]
            except (OSError, StoreFullError) as error:
                log.warning("layer %d is fetched again, it cannot be kept: %s", layer, error)
                os.close(self._files.pop(layer))

        return write

    def pour(self, layer: int, stored: StoredLayer) -> None:
        """Move a layer into the store. Blocks; what the store does not take is fetched again."""
        file = self._files.pop(layer, None)
        if file is None:
            return
        try:
            for chunk in stored.missing(0, stored.table.chunk_count - 1):
                length = stored.table.chunk_length(chunk)
                stored.write(chunk, os.pread(file, length, chunk * CHUNK_SIZE), remember=False)
        except (OSError, FirstByteError) as error:
            log.warning("layer %d is fetched again, it cannot be kept: %s", layer, error)
        finally:
            os.close(file)

    def close(self) -> None:
        while self._files:
            os.close(self._files.popitem()[1])
        self._space.release(self._reserved)
        self._reserved = 0
