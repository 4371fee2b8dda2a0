"""What every codec offers to the rest of the index, and the limit all of them keep."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, TypeVar

from index.errors import CodecError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from index.tables import SeekPoint

_T = TypeVar("_T")

PIECE_SIZE = 1 << 20
"""The most raw bytes that a scanner hands out at once: what a bomb can make it hold in memory."""


class Submit(Protocol):
    """Lets work be done, now or in a thread: one after the other, in this order."""

    def __call__(self, work: Callable[[_T], None], subject: _T, /) -> None: ...


def at_once(work: Callable[[_T], None], subject: _T) -> None:
    """A Submit."""
    work(subject)


class Scanner(Protocol):
    """Decompresses a whole blob and notes where decompression could start again.

    What it notes is a property of the blob alone: not of how the input was cut into pieces, nor
    of the machine or the version of a library. `points` and `windows` are complete after
    `finish`, when all that was submitted is done; the first point is at raw 0 always, the last lies
    before the end of raw space unless it is the first. `windows` has WINDOW_SIZE bytes for each
    point that has a window, in order.
    """

    points: list[SeekPoint]
    windows: list[bytes]

    def feed(self, data: bytes | memoryview) -> Iterator[bytes]:
        """Yield the raw bytes that `data` completes, in pieces of 1 … PIECE_SIZE bytes.

        The iterator must be exhausted before the next call. CodecError if the blob is malformed
        or holds more raw bytes than the limit; UnsupportedError if it needs what we do not have.
        """

    def finish(self) -> None:
        """The blob ends here. CodecError if it cannot."""


class Decoder(Protocol):
    """Decompresses from one seek point on. Fed the blob from the point's first byte."""

    def feed(self, data: bytes | memoryview) -> bytes:
        """Raw bytes that `data` completes, never more than the limit.

        After all bytes up to another point, or the end of the blob, all raw bytes up to there have
        come; until then a decoder may wait for the end of a block (zstd and lz4: 128 KiB, 4 MiB).
        CodecError if the data is malformed or makes more than the limit of raw bytes in total.
        After an error the decoder is of no more use.
        """

    def allow(self, limit: int) -> None:
        """Let more raw bytes come: `limit` in all, if that is more than before."""


class RawLimit:
    """Counts raw bytes and refuses to go past `limit`."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.total = 0

    @property
    def room(self) -> int:
        """Most bytes to ask of a decompressor: one more than allowed, so that too much shows."""
        return self.limit - self.total + 1

    def allow(self, limit: int) -> None:
        """Raise it."""
        self.limit = max(self.limit, limit)

    def count(self, length: int) -> None:
        self.total += length
        if self.total > self.limit:
            raise CodecError(
                f"compressed data holds more than {self.limit} bytes",
                hint="it is damaged, or made to exhaust this machine",
            )
