"""Sparse files of GNU tar's four formats: where their data is, and what it expands to."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from index.entry import Entry, Segment
from index.errors import TarError, UnsupportedError
from index.tar import TarScanner
from tests.support.merged import content, merge, scan
from tests.support.tars import (
    Member,
    file,
    header,
    sparse_old,
    sparse_pax,
    tar,
)


def only(archive: bytes) -> Entry:
    (entry,) = scan(archive)
    return entry


_RUNS = st.lists(
    st.tuples(st.sampled_from([0, 1, 12, 500, 512, 1024]), st.binary(max_size=1100)), max_size=30
)


@given(_RUNS, st.integers(0, 2000), st.sampled_from(["old", "0.0", "0.1", "1.0"]))
@example([(0, b"a" * 512), (512, b"b" * 100)], 0, "1.0")
@example([(512, b"a" * 700), (324, b"b" * 324)], 512, "old")
def test_sparse_files_of_all_formats_expand_to_their_content(
    gaps: list[tuple[int, bytes]], hole: int, form: str
) -> None:
    expected = bytearray()
    runs = []
    for gap, data in gaps:
        expected += bytes(gap)
        runs.append((len(expected), data))
        expected += data
    expected += bytes(hole)
    size = len(expected)
    if form == "old":
        member = sparse_old(b"f", size, [run for run in runs if run[1]])
    else:
        # GNU tar ends every map with an empty entry.
        member = sparse_pax(b"f", size, [*runs, (size, b"")], form)
    archive = tar(member, file(b"next", b"after"))
    root = merge([archive])
    assert content(root.children[b"f"], [archive]) == bytes(expected)
    assert content(root.children[b"next"], [archive]) == b"after"


def test_aligned_sparse_data_stays_in_the_layer() -> None:
    runs = [(1024, b"a" * 1024), (1 << 32, b"b" * 700)]
    entry = only(tar(sparse_old(b"f", (1 << 32) + 700, runs)))
    assert entry.segments == (Segment(1024, 512, 1024), Segment(1 << 32, 1536, 700))
    assert entry.embedded == ()


def test_only_what_blocks_cannot_address_is_embedded() -> None:
    entry = only(tar(sparse_old(b"f", 10_000, [(512, b"a" * 1000), (5000, b"b" * 10)])))
    assert entry.segments == (Segment(512, 512, 512),)
    assert entry.embedded == ((1024, b"a" * 488), (5000, b"b" * 10))


@pytest.mark.parametrize(
    ("size", "runs"),
    [(100, [(0, b"a" * 200)]), (900, [(512, b"a"), (0, b"b")]), (900, [(0, b"abc"), (2, b"d")])],
    ids=["past the end", "descending", "overlapping"],
)
@pytest.mark.parametrize("form", ["old", "1.0"])
def test_sparse_maps_that_make_no_sense_are_errors(
    size: int, runs: list[tuple[int, bytes]], form: str
) -> None:
    member = sparse_old(b"f", size, runs) if form == "old" else sparse_pax(b"f", size, runs)
    with pytest.raises(TarError, match="sparse map"):
        scan(tar(member))


def _sparse(*records: tuple[bytes, bytes], data: bytes = b"") -> bytes:
    return tar(Member(b"f", data=data, pax=records))


@pytest.mark.parametrize(
    "archive",
    [
        _sparse((b"GNU.sparse.map", b"0,1"), (b"GNU.sparse.numblocks", b"2"), data=b"x"),
        _sparse((b"GNU.sparse.map", b"0,1"), data=b"x"),
        _sparse((b"GNU.sparse.map", b"0,2"), (b"GNU.sparse.numblocks", b"1"), data=b"x"),
        _sparse((b"GNU.sparse.offset", b"0"), (b"GNU.sparse.offset", b"0")),
        _sparse((b"GNU.sparse.major", b"1"), (b"GNU.sparse.minor", b"0")),
        _sparse((b"GNU.sparse.major", b"1"), (b"GNU.sparse.minor", b"0"), data=b"x" * 512),
        _sparse((b"GNU.sparse.major", b"1"), (b"GNU.sparse.minor", b"0"), data=b"99999999\n"),
        _sparse((b"GNU.sparse.major", b"1"), (b"GNU.sparse.minor", b"0"), data=b"-1\n" * 200),
        _sparse((b"GNU.sparse.major", b"2"), (b"GNU.sparse.minor", b"0")),
        tar(header(b"f", b"S")),
    ],
)
def test_malformed_sparse_files_are_errors(archive: bytes) -> None:
    with pytest.raises(TarError):
        scan(archive)


def test_sparse_maps_are_bounded() -> None:
    numbers = b"0,0," * 65_537
    records = ((b"GNU.sparse.map", numbers[:-1]), (b"GNU.sparse.numblocks", b"65537"))
    with pytest.raises(TarError, match="65537 entries"):
        scan(_sparse(*records))
    endless = b"1" * (2 << 20)
    records = ((b"GNU.sparse.major", b"1"), (b"GNU.sparse.minor", b"0"))
    with pytest.raises(TarError, match="more than 1048576 bytes"):
        scan(_sparse(*records, data=endless))


def test_embedded_data_is_bounded_per_layer() -> None:
    half = bytes(33 << 20)
    scanner = TarScanner()
    assert scanner.feed(sparse_pax(b"a", 64 << 20, [(1, half)]))
    with pytest.raises(UnsupportedError, match="67108864"):
        scanner.feed(sparse_pax(b"b", 64 << 20, [(1, half)]))
