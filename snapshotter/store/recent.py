"""Which chunks were written since the machine started, synced or not.

What a process has written stays in the kernel's page cache when it is killed, so its successor
need not fetch it again, only sync it. After a power cut that is not so: then the machine has
another boot ID, and what this file says counts for nothing. So it is never synced.

    offset size field
         0    8 magic "FBrecent"
         8    4 version, 1
        12    4 bytes in a chunk
        16   16 boot ID (random(4), /proc/sys/kernel/random/boot_id)
        32   32 content key of the layer
        64      one byte a chunk: 1 if it was written

A byte a chunk, because a byte is changed without the others being read.
"""

from __future__ import annotations

import os
import struct
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

from index.tables import CHUNK_SIZE
from snapshotter.store.errors import store_error

if TYPE_CHECKING:
    from collections.abc import Iterable

    from index.tables import LayerTable

_MAGIC = b"FBrecent"
_VERSION = 1
_HEADER = struct.Struct("<8sII16s32s")
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def boot_id() -> bytes:
    """16 bytes that no other boot of any machine has. Raises OSError."""
    return uuid.UUID(_BOOT_ID.read_text().strip()).bytes


class RecentChunks:
    """The open file of one layer. Not thread-safe: its layer holds a lock around every call."""

    def __init__(self, path: Path, table: LayerTable) -> None:
        """Open or create; what is of another boot is started anew. Raises StoreError."""
        self._count = table.chunk_count
        try:
            header = _HEADER.pack(_MAGIC, _VERSION, CHUNK_SIZE, boot_id(), table.content_key)
            self._handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                size = len(header) + self._count
                content = os.pread(self._handle, size + 1, 0)
                if len(content) != size or not content.startswith(header):
                    os.ftruncate(self._handle, 0)
                    # All of it now: on a disk that is full later, bytes can still be changed.
                    content = header.ljust(size, b"\0")
                    os.pwrite(self._handle, content, 0)
            except BaseException:
                os.close(self._handle)
                raise
        except OSError as error:
            raise store_error(error, path, "cannot open") from error
        self._found = content[len(header) :]

    def chunks(self) -> list[int]:
        """What a predecessor of this boot has written."""
        return [chunk for chunk, written in enumerate(self._found) if written]

    def add(self, chunk: int) -> None:
        """A chunk was written, all of it. Raises OSError."""
        os.pwrite(self._handle, b"\1", _HEADER.size + chunk)

    def remove(self, chunks: Iterable[int]) -> None:
        """Chunks are not to be believed. Raises OSError."""
        for chunk in chunks:
            os.pwrite(self._handle, b"\0", _HEADER.size + chunk)

    def close(self) -> None:
        os.close(self._handle)
        self._handle = -1
