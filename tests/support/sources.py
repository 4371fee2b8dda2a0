"""A blob source in memory that can be told to misbehave, and that notes what was asked of it."""

from __future__ import annotations

from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import trio

from snapshotter.registry.errors import NetworkError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable

    from index.errors import FirstByteError
    from tests.support.blobs import MadeLayer

PIECE = 64 << 10


@dataclass
class Fault:
    """What goes wrong with one request: after `good` bytes, `error` is raised, or the body ends
    (`ends`), or nothing more comes (`hangs`); `change` alters the pieces before that."""

    good: int = 1 << 62
    error: FirstByteError | None = None
    ends: bool = False
    hangs: bool = False
    change: Callable[[int, bytes], bytes] | None = None


@dataclass
class MemorySource:
    """Serves a made layer. `faults` apply to one request each, in order; None is a good one."""

    layer: MadeLayer
    faults: list[Fault | None] = field(default_factory=list)
    delay: float = 0
    """Seconds before each piece."""
    piece: int = PIECE
    requests: list[tuple[int, int]] = field(default_factory=list)
    doubts: int = 0
    """How often its bytes were said to be wrong."""
    served: int = 0
    open: int = 0
    most_open: int = 0
    gate: trio.Event | None = None
    """No request is answered before this is set."""

    site: str = "memory"

    def doubt(self) -> None:
        self.doubts += 1

    def window(self, point: int) -> bytes | None:
        return self.layer.windows.get(point)

    @asynccontextmanager
    async def open_range(self, start: int, end: int) -> AsyncIterator[AsyncIterator[bytes]]:
        assert 0 <= start < end <= len(self.layer.blob)
        self.requests.append((start, end))
        fault = (self.faults.pop(0) if self.faults else None) or Fault()
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        try:
            async with aclosing(self._body(start, end, fault)) as body:
                yield body
        finally:
            self.open -= 1

    async def _body(self, start: int, end: int, fault: Fault) -> AsyncGenerator[bytes, None]:
        if self.gate is not None:
            await self.gate.wait()
        stop = min(end, start + fault.good)
        position = start
        while position < stop:
            await trio.sleep(self.delay)
            data = self.layer.blob[position : min(position + self.piece, stop)]
            if fault.change is not None:
                data = fault.change(position, data)
            position += len(data)
            self.served += len(data)
            yield data
        if position < end and not fault.ends:
            if fault.hangs:
                await trio.sleep_forever()
            raise fault.error or NetworkError("the connection was reset")
