"""A small memory of chunks that have just been verified, one for the whole node."""

from __future__ import annotations

import threading
from collections import OrderedDict

CHUNKS = 64
"""Chunks kept: 16 MiB. Enough for some dozens of readers walking through neighbouring bytes."""


class VerifiedCache:
    """The least recently used go first. Thread-safe."""

    def __init__(self, capacity: int = CHUNKS) -> None:
        self._capacity = capacity
        self._chunks: OrderedDict[tuple[bytes, int], bytes | memoryview] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: bytes, chunk: int) -> bytes | memoryview | None:
        with self._lock:
            data = self._chunks.get((key, chunk))
            if data is not None:
                self._chunks.move_to_end((key, chunk))
            return data

    def put(self, key: bytes, chunk: int, data: bytes | memoryview) -> None:
        """Keep verified bytes, which nobody may change any more."""
        with self._lock:
            self._chunks[key, chunk] = data
            self._chunks.move_to_end((key, chunk))
            if len(self._chunks) > self._capacity:
                self._chunks.popitem(last=False)

    def __len__(self) -> int:
        return len(self._chunks)
