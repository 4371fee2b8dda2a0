"""Cutting answers to what was asked for, whatever the pieces."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapshotter.registry.errors import NetworkError, ProtocolError
from snapshotter.registry.ranges import cut, offset_in_body

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator


def offset(status: int, content_range: str | None = None, content_length: int | None = None) -> int:
    return offset_in_body(
        status,
        content_range=content_range,
        content_length=content_length,
        start=10,
        end=20,
        size=100,
        what="it",
    )


def test_where_the_range_starts() -> None:
    """206 is the range, 200 is everything."""
    assert offset(206, "bytes 10-19/100") == 0
    assert offset(206, "bytes 10-19/*") == 0
    assert offset(200) == offset(200, content_length=100) == 10


@pytest.mark.parametrize(
    "content_range",
    [None, "", "bytes 10-19", "bytes 9-19/100", "bytes 10-18/100", "bytes 10-20/100",
     "bytes 10-19/101", "bytes */100", "items 10-19/100", "bytes 10-19/100, bytes 1-2/100"],
)  # fmt: skip
def test_range_that_was_not_asked_for(content_range: str | None) -> None:
    """A 206 must be exactly the range, of a blob of the known size."""
    with pytest.raises(ProtocolError, match=r"^it"):
        offset(206, content_range)


@given(st.data())
async def test_cut(data: st.DataObject) -> None:
    """Exactly the wanted bytes come out, or a NetworkError when there are too few."""
    pieces = data.draw(st.lists(st.binary(min_size=1, max_size=9), max_size=8))
    body = b"".join(pieces)
    skip = data.draw(st.integers(0, len(body) + 2))
    length = data.draw(st.integers(1, len(body) + 2))
    drain = data.draw(st.booleans())

    async def stream() -> AsyncGenerator[bytes, None]:
        for piece in pieces:
            yield piece

    got = []
    source = stream()
    try:
        async for piece in cut(source, skip, length, drain=drain, what="it"):
            got.append(piece)  # noqa: PERF401  (what came before an error counts)
    except NetworkError:
        assert len(body) < skip + length
        assert b"".join(got) == body[skip:]
    else:
        assert b"".join(got) == body[skip : skip + length]
    finally:
        await source.aclose()
    assert all(got)
