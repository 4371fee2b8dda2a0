"""Part of a blob, front to back, however many requests that takes."""

from __future__ import annotations

import logging
import math
import random
from contextlib import suppress
from typing import TYPE_CHECKING

import trio

from index.errors import FirstByteError
from snapshotter.fetch.errors import FetchError
from snapshotter.fetch.wants import Priority
from snapshotter.registry.errors import NetworkError, ProtocolError, RegistryError
from snapshotter.registry.retry import RetryPolicy

if TYPE_CHECKING:
    from collections.abc import Callable

    from snapshotter.fetch.pacing import Exchange
    from snapshotter.fetch.scheduler import Scheduler
    from snapshotter.fetch.source import PackSource

log = logging.getLogger(__name__)

WAITING = 16
"""Pieces of a body, of 256 KiB at most, that wait for whoever takes them."""

BATCH = 256 << 10
"""Bytes that are taken together: a hop to a thread, to decode them, costs 0.1 ms."""

SILENCE = 30.0
"""Seconds without a byte after which a request counts as failed."""

RETRIES = RetryPolicy(attempts=5)


class BlobStream:
    """Bytes `start` … `end`. `run` it in a task, take from it in another.

    `received` is the place of the next byte to come over the network, `position` that of the next
    byte to be taken. `silent_since` is when the network was last asked for more, and did not
    answer yet. `trouble` is called when a request has failed, and will be made again.

    A stream that is `held` asks, but does not read on: until `release` the answer keeps no more of
    the link than a connection's buffers take.
    """

    def __init__(
        self,
        source: PackSource,
        scheduler: Scheduler,
        start: int,
        end: int,
        *,
        trouble: Callable[[], None],
        held: bool = False,
    ) -> None:
        self.position = self.received = start
        self.end = end
        self.silent_since = math.inf
        self.progressed_at = trio.current_time()
        self._source = source
        self._scheduler = scheduler
        self._trouble = trouble
        self._released = trio.Event()
        if not held:
            self._released.set()
        self._error: FirstByteError | None = None
        self._rest = b""
        self._scope = trio.CancelScope()
        self._sender, self._receiver = trio.open_memory_channel[bytes](WAITING)
        self._rng = random.Random()  # noqa: S311  (spreads load, guards nothing)

    async def run(self) -> None:
        """Receive. What goes wrong is raised by `take`."""
        with self._scope, self._sender:
            try:
                await self._requests()
            except FirstByteError as error:
                self._error = error
            except Exception as error:
                log.exception("%s failed in an unforeseen way", self._source)
                self._error = FetchError(f"{self._source} failed in an unforeseen way")
                self._error.__cause__ = error

    def release(self) -> None:
        """Read on, if it was held."""
        self._released.set()

    def close(self) -> None:
        """Receive no more."""
        self._scope.cancel()

    @property
    def closed(self) -> bool:
        return self._scope.cancel_called

    async def take(self, end: int) -> bytes:
        """The next bytes up to `end`, some BATCH of them. Raises FirstByteError if none come."""
        parts = [self._rest] if self._rest else []
        size = len(self._rest)
        if not parts:
            try:
                parts.append(await self._receiver.receive())
            except trio.EndOfChannel:
                raise self._error or FetchError(f"{self._source} ended too early") from None
            size = len(parts[0])
        with suppress(trio.WouldBlock, trio.EndOfChannel):
            while size < BATCH:
                parts.append(self._receiver.receive_nowait())
                size += len(parts[-1])
        data = parts[0] if len(parts) == 1 else b"".join(parts)
        data, self._rest = data[: end - self.position], data[end - self.position :]
        self.position += len(data)
        return data

    def give_back(self, data: bytes) -> None:
        """Bytes that were taken but are to be taken again."""
        self._rest = data + self._rest
        self.position -= len(data)

    async def _requests(self) -> None:
        failures = 0
        while self.received < self.end:
            before = self.received
            try:
                await self._request()
            except RegistryError as error:
                failures = failures + 1 if self.received == before else 1
                delay = RETRIES.delay(failures, error, rng=self._rng)
                if delay is None:
                    raise
                log.info("%s: %s; trying again in %.1f s", self._source, error, delay)
                self._scheduler.stats.retries += 1
                self.silent_since = math.inf
                self._trouble()
                await trio.sleep(delay)

    async def _request(self) -> None:
        left = self.end - self.received
        self._scheduler.stats.requests[Priority.STARTUP] += 1
        exchange = self._scheduler.begin_exchange(self._source.site, left)
        failure: RegistryError | None = None
        try:
            await self._receive(exchange)
        except RegistryError as error:
            failure = error
            raise
        finally:
            exchange.ended(
                trio.current_time(),
                failed=failure is not None and failure.transient,
                retry_after=getattr(failure, "retry_after", None),
            )
            self._scheduler.notice()

    async def _receive(self, exchange: Exchange) -> None:
        with trio.CancelScope() as patience:
            self._expect_byte(patience)
            async with self._source.open_range(self.received, self.end) as body:
                exchange.answered(trio.current_time())
                patience.deadline = self.silent_since = math.inf
                await self._released.wait()
                self._expect_byte(patience)
                async for piece in body:
                    self.received += len(piece)
                    exchange.received(trio.current_time(), len(piece))
                    self._scheduler.stats.received_bytes[Priority.STARTUP] += len(piece)
                    if self.received > self.end:
                        raise ProtocolError(f"more of {self._source} came than was asked for")
                    patience.deadline = self.silent_since = math.inf  # it is not the source now
                    self.progressed_at = trio.current_time()
                    await self._sender.send(piece)
                    self._expect_byte(patience)
        if patience.cancelled_caught:
            raise NetworkError(f"no byte of {self._source} has come for {SILENCE:g} seconds")
        self.silent_since = math.inf
        if self.received < self.end:
            raise NetworkError(f"{self._source} ended too early")

    def _expect_byte(self, patience: trio.CancelScope) -> None:
        self.silent_since = trio.current_time()
        patience.deadline = self.silent_since + SILENCE
