"""No compression: raw space is the blob."""

from __future__ import annotations

from typing import TYPE_CHECKING

from index.codecs.base import PIECE_SIZE, RawLimit
from index.tables import SeekPoint

if TYPE_CHECKING:
    from collections.abc import Iterator


class PlainScanner:
    """See Scanner. One point is enough: any byte can be reached from it."""

    def __init__(self, *, limit: int) -> None:
        self.points = [SeekPoint(0, 0)]
        self.windows: list[bytes] = []
        self._raw = RawLimit(limit)

    def feed(self, data: bytes | memoryview) -> Iterator[bytes]:
        for start in range(0, len(data), PIECE_SIZE):
            raw = bytes(data[start : start + PIECE_SIZE])
            self._raw.count(len(raw))
            yield raw

    def finish(self) -> None:
        """A plain blob may end anywhere: whether its tar is whole is for the tar scanner."""


class PlainDecoder:
    """See Decoder. May be fed from any byte of the blob on."""

    def __init__(self, *, limit: int) -> None:
        self._raw = RawLimit(limit)

    def allow(self, limit: int) -> None:
        self._raw.allow(limit)

    def feed(self, data: bytes | memoryview) -> bytes:
        self._raw.count(len(data))
        return bytes(data)
