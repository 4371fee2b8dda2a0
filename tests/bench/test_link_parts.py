"""The parts of a network link: how it is spelled, its delay, the requests on it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapshotter.bench.errors import BenchError
from snapshotter.bench.link.counters import Carried, Counters
from snapshotter.bench.link.delay import DelayLine, End
from snapshotter.bench.link.profiles import STANDARD, LinkProfile
from snapshotter.bench.link.requests import RequestFinder

if TYPE_CHECKING:
    from pathlib import Path

GET = b"GET /v2/ HTTP/1.1\r\nHost: registry\r\n\r\n"
PUT = b"PUT /v2/x HTTP/1.1\r\ncontent-length: 9\r\n\r\nGET / HTT"
CHUNKED = b"POST /v2/x HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n"


def test_a_link_is_spelled_as_bandwidth_round_trip_and_failures() -> None:
    assert LinkProfile.parse("20mbit-150ms-1%") == LinkProfile(20e6, 0.15, 0.01)
    assert LinkProfile.parse("1000mbit-0.5ms") == LinkProfile(1e9, 0.0005)


@pytest.mark.parametrize("profile", STANDARD)
def test_a_links_name_is_its_spelling(profile: LinkProfile) -> None:
    assert LinkProfile.parse(profile.name) == profile


@pytest.mark.parametrize(
    "text", ["", "fast", "0mbit-1ms", "200-20", "200mbit-20ms-100%", "1mbit-99999ms", "-1mbit-1ms"]
)
def test_what_is_no_link_is_refused(text: str) -> None:
    with pytest.raises(BenchError, match="link"):
        LinkProfile.parse(text)


def test_nothing_comes_out_before_its_time() -> None:
    line = DelayLine(100)
    line.put(b"first", 1.0)
    line.put(b"second", 2.0)
    assert line.ripe(0.9) is None
    assert line.ripe(1.0) == b"first"
    line.take(2)
    assert line.ripe(1.0) == b"rst"
    line.take(3)
    assert line.ripe(1.9) is None
    assert line.due == 2.0


def test_nothing_overtakes_what_was_before_it() -> None:
    line = DelayLine(100)
    line.put(b"slow", 2.0)
    line.put(b"quick", 1.0)
    line.put(End.FINISHED, 0.0)
    assert line.due == 2.0
    line.take(4)
    assert line.ripe(1.9) is None
    line.take(5)
    assert line.ripe(2.0) is End.FINISHED


def test_a_line_is_full_at_its_limit_until_something_is_taken() -> None:
    line = DelayLine(4)
    line.put(b"abc", 0)
    assert not line.full
    line.put(b"d", 0)
    assert line.full
    line.take(1)
    assert not line.full


@given(
    st.lists(st.sampled_from([GET, PUT, GET, b"\x16\x03\x01hello", CHUNKED]), max_size=6),
    st.randoms(use_true_random=False),
)
def test_requests_are_found_however_the_stream_is_cut(parts: list[bytes], random: object) -> None:
    stream = b"".join(parts)
    readable = 0
    for part in parts:
        if part[:1] == b"\x16":
            break  # not HTTP: from here on nobody can tell
        readable += 1
        if part == CHUNKED:
            break
    cuts = sorted(random.randrange(len(stream) + 1) for _ in range(4))  # type: ignore[attr-defined]
    finder, pieces = RequestFinder(), []
    for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        pieces += finder.feed(stream[start:end])
    assert b"".join(piece.data for piece in pieces) == stream
    assert sum(piece.begins for piece in pieces) == readable
    assert sum(piece.whole for piece in pieces) == parts[:readable].count(GET)


def test_an_unfinished_head_is_kept_back() -> None:
    finder = RequestFinder()
    assert finder.feed(GET[:10]) == []
    (piece,) = finder.feed(GET[10:])
    assert piece.data == GET


def test_counters_are_seen_by_others_at_once(tmp_path: Path) -> None:
    writer, reader = Counters(tmp_path / "counters"), Counters(tmp_path / "counters")
    assert reader.read() == Carried(0, 0, 0, 0, 0)
    writer.write(Carried(5, 4, 3, 2, 1))
    assert reader.read().since(Carried(1, 1, 1, 1, 1)) == Carried(4, 3, 2, 1, 0)
