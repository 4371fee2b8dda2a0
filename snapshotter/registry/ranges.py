"""Range requests: what an answer's body holds, and cutting it to what was asked for. No sockets.

Source: RFC 9110 section 14. Strict: whatever does not fit the blob's size is refused, because a
range cannot be verified by the blob's digest.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from snapshotter.registry.errors import NetworkError, ProtocolError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

_CONTENT_RANGE = re.compile(r"\s*bytes\s+([0-9]{1,19})-([0-9]{1,19})/([0-9]{1,19}|\*)\s*")


def range_header(start: int, end: int) -> str:
    """The Range header for the bytes `start` … `end` (exclusive, > `start`)."""
    return f"bytes={start}-{end - 1}"


def offset_in_body(
    status: int,
    *,
    content_range: str | None,
    content_length: int | None,
    start: int,
    end: int,
    size: int,
    what: str,
) -> int:
    """Bytes of the body to skip before `start`, for an answer below 400 to that range request.

    206 is the range itself: 0. 200 is a server without ranges that sends the whole blob: `start`.
    Such a server costs `start` bytes of transfer for each request, and a connection if the blob
    goes on after `end`. Raises ProtocolError for anything else, or if sizes do not fit.
    """
    if status == 200:
        if content_length is not None and content_length != size:
            raise ProtocolError(f"{what} has {content_length} bytes there, not {size}")
        return start
    if status != 206:
        raise ProtocolError(f"{what}: unexpected status {status} for a range")
    match = _CONTENT_RANGE.fullmatch(content_range or "")
    if match is None:
        raise ProtocolError(f"{what}: range answered without a valid Content-Range")
    if (int(match[1]), int(match[2]) + 1) != (start, end):
        raise ProtocolError(f"{what}: asked for bytes {start}-{end - 1}, got {match[1]}-{match[2]}")
    if match[3] not in ("*", str(size)):
        raise ProtocolError(f"{what} has {match[3]} bytes there, not {size}")
    return 0


async def cut(
    pieces: AsyncGenerator[bytes, None], skip: int, length: int, *, drain: bool, what: str
) -> AsyncGenerator[bytes, None]:
    """Exactly `length` (> 0) bytes of a body, after the first `skip`; NetworkError if it is short.

    With `drain`, the body should end there: its end is awaited before the last piece is passed
    on, so that the connection can be used again. What comes instead of an end is dropped.
    """
    left = length
    async for piece in pieces:
        if skip >= len(piece):
            skip -= len(piece)
            continue
        wanted = piece[skip : skip + left] if skip or left < len(piece) else piece
        skip = 0
        left -= len(wanted)
        if left == 0 and drain:
            await anext(pieces, None)
        yield wanted
        if left == 0:
            return
    raise NetworkError(f"{what}: body ended {left} bytes early")
