"""Startup profiles: what is written is read, what makes no sense is refused, runs are merged."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from index.errors import FirstByteError, FormatError, UnsupportedError
from index.profile import MAX_RUNS, MAX_TOUCHES, Profile, Touch, decode, encode, merge

LAYERS = 3
DIFF_IDS = tuple(bytes([number]) * 32 for number in range(LAYERS))

places = st.lists(st.tuples(st.integers(0, LAYERS - 1), st.integers(0, 40)), unique=True)


@st.composite
def profiles(draw: st.DrawFn) -> Profile:
    runs = draw(st.integers(1, MAX_RUNS - 1))
    touches = [
        Touch(layer, chunk, draw(st.integers(0, 99_999)), draw(st.integers(1, runs)))
        for layer, chunk in draw(places)
    ]
    return Profile(DIFF_IDS, tuple(touches), runs, draw(st.text(max_size=20)))


def run(*places: tuple[int, int]) -> Profile:
    """What one run records, a chunk each 10 ms."""
    return Profile(
        DIFF_IDS, tuple(Touch(layer, chunk, 10 * n) for n, (layer, chunk) in enumerate(places))
    )


@given(profiles())
def test_what_is_written_is_read(profile: Profile) -> None:
    assert decode(encode(profile)) == profile
    assert encode(decode(encode(profile))) == encode(profile)


@given(st.binary())
def test_anything_else_is_refused(data: bytes) -> None:
    with pytest.raises(FormatError, match="not a startup profile"):
        decode(data)


@given(profiles(), st.data())
def test_a_damaged_one_is_refused_or_makes_sense(profile: Profile, data: st.DataObject) -> None:
    encoded = bytearray(encode(profile))
    at = data.draw(st.integers(0, len(encoded) - 1))
    encoded[at] = data.draw(st.integers(0, 255))
    try:
        read = decode(bytes(encoded))
    except FirstByteError:
        return
    assert all(0 <= touch.layer < len(read.diff_ids) for touch in read.touches)
    assert len({touch.place for touch in read.touches}) == len(read.touches)


def written(**changes: Any) -> bytes:
    document = json.loads(encode(run((0, 1), (2, 5))))
    return json.dumps(document | changes).encode()


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"format": "something else"}, id="another format"),
        pytest.param({"runs": 0}, id="of no run"),
        pytest.param({"layers": ["sha256:12"]}, id="malformed diffID"),
        pytest.param({"touches": [[3, 0, 0, 1]]}, id="no such layer"),
        pytest.param({"touches": [[0, -1, 0, 1]]}, id="negative chunk"),
        pytest.param({"touches": [[0, 1 << 23, 0, 1]]}, id="chunk past any layer"),
        pytest.param({"touches": [[0, 0, 0, 2]]}, id="in more runs than there were"),
        pytest.param({"touches": [[0, 0, 0, 0]]}, id="in no run"),
        pytest.param({"touches": [[0, 0, 0, 1], [0, 0, 1, 1]]}, id="a chunk twice"),
        pytest.param({"touches": [[0, n, 0, 1] for n in range(MAX_TOUCHES + 1)]}, id="too many"),
        pytest.param({"more": 1}, id="unknown field"),
        pytest.param({"name": "x" * (2 << 20)}, id="too large"),
    ],
)
def test_what_makes_no_sense_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(FormatError):
        decode(written(**changes))


def test_another_version_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedError, match="has version 2"):
        decode(written(version=2, new=[]))


def test_runs_of_different_images_are_not_merged() -> None:
    with pytest.raises(FormatError, match="different images"):
        merge(run((0, 1)), replace(run((0, 1)), diff_ids=DIFF_IDS[1:]))


def test_the_order_is_that_of_the_latest_run() -> None:
    merged = merge(run((0, 1), (0, 2), (1, 3)), run((1, 3), (0, 2), (0, 1)))
    assert [touch.place for touch in merged.touches] == [(1, 3), (0, 2), (0, 1)]
    assert merged.runs == 2
    assert {touch.seen for touch in merged.touches} == {2}


def test_what_a_run_did_not_touch_stays_behind_what_it_followed() -> None:
    """The kernel had it in its page cache, perhaps: it is not forgotten."""
    merged = merge(run((2, 9), (0, 1), (0, 2), (1, 3)), run((1, 3), (0, 1), (1, 7)))
    assert [touch.place for touch in merged.touches] == [(2, 9), (1, 3), (0, 1), (0, 2), (1, 7)]
    assert [touch.seen for touch in merged.touches] == [1, 2, 2, 1, 1]
    assert [touch.after for touch in merged.touches] == [0, 0, 10, 10, 20]


def test_a_chunk_is_brought_if_one_start_in_four_touches_it() -> None:
    usual = run((0, 1), (0, 2))
    merged = merge(usual, run((0, 1), (0, 2), (0, 99)))
    for _ in range(2):
        merged = merge(merged, usual)
    assert [touch.place for touch in merged.likely] == [(0, 1), (0, 2), (0, 99)]
    merged = merge(merged, usual)
    assert [touch.place for touch in merged.likely] == [(0, 1), (0, 2)]
    assert len(merged.touches) == 3


def test_a_look_at_one_file_is_no_start() -> None:
    """It does not make the chunks of real starts less likely, however often it happens."""
    profile = run(*((0, chunk) for chunk in range(20)))
    for _ in range(50):
        profile = merge(profile, run((1, 1)))
    assert profile.runs == 1
    assert {touch.place for touch in profile.likely} == {(0, n) for n in range(20)} | {(1, 1)}


def test_what_starts_have_ceased_to_touch_is_forgotten() -> None:
    profile = run((0, 1), (0, 2), (0, 3))
    for _ in range(2 * MAX_RUNS):
        profile = merge(profile, run((0, 1), (0, 2)))
    assert [touch.place for touch in profile.touches] == [(0, 1), (0, 2)]


@given(st.lists(places, min_size=1, max_size=40))
def test_merging_any_runs_gives_a_valid_profile_that_has_all_of_the_last_one(
    runs: list[list[tuple[int, int]]],
) -> None:
    merged = run(*runs[0])
    for touched in runs[1:]:
        merged = merge(merged, run(*touched))
        assert decode(encode(merged)) == merged
        assert merged.runs < MAX_RUNS
        assert [t.place for t in merged.touches if t.place in touched] == [
            place for place in touched if place in {t.place for t in merged.touches}
        ]
        times = [touch.after for touch in merged.touches]
        assert times == sorted(times)


def test_a_profile_stays_within_its_bounds_and_keeps_what_is_touched_most() -> None:
    usual = run(*((0, chunk) for chunk in range(100)))
    usual = merge(usual, usual)
    merged = merge(usual, run(*((1, chunk) for chunk in range(MAX_TOUCHES))))
    assert len(merged.touches) == MAX_TOUCHES
    assert {(0, chunk) for chunk in range(100)} <= {touch.place for touch in merged.touches}
