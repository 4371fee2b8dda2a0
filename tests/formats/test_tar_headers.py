"""Headers of all ages, and the extended headers before them, mean what their standards say."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from index.entry import Entry, EntryType, Segment
from index.errors import TarError, UnsupportedError
from index.header import parse_number
from index.pax import parse_records, parse_time
from index.tar import MAX_SIZE, TarScanner
from tests.support.merged import scan
from tests.support.tars import (
    CAPABILITY,
    END,
    GNU,
    SECOND,
    V7,
    Member,
    base256,
    directory,
    encode,
    file,
    gnu_long,
    hardlink,
    header,
    octal,
    padded,
    pax_header,
    symlink,
    tar,
)


def only(archive: bytes) -> Entry:
    (entry,) = scan(archive)
    return entry


# --- headers ----------------------------------------------------------------------------------


def test_checksums_are_verified() -> None:
    with pytest.raises(TarError, match="checksum"):
        scan(header(checksum=b"000001\0 "))


def test_checksums_of_signed_bytes_are_accepted() -> None:
    block = header(b"\xff" * 100)
    signed = sum(byte - 256 * (byte >> 7) for byte in block[:148] + b" " * 8 + block[156:])
    assert only(header(b"\xff" * 100, checksum=b"%06o\0 " % signed)).name == b"\xff" * 100


@given(st.integers(0, 511), st.integers(1, 255))
def test_any_changed_byte_of_a_header_is_noticed(position: int, change: int) -> None:
    block = bytearray(encode(file(b"name", mtime_ns=SECOND, uid=1000)))
    block[position] ^= change
    unchanged = only(encode(file(b"name", mtime_ns=SECOND, uid=1000)))
    try:
        entry = only(bytes(block))
    except TarError:
        return
    # Only the way the checksum is written can change.
    assert 148 <= position < 156
    assert entry == unchanged


@pytest.mark.parametrize(
    ("field", "value"),
    [
        (b"0000644\0", 0o644),
        (b"000644 \0", 0o644),
        (b"   644 \0", 0o644),
        (b"644\0\0\0\0\0", 0o644),
        (b"\0\0\0\0\0\0\0\0", 0),
        (b"        ", 0),
        (b"644\0junk", 0o644),
        (b"77777777", 0o77777777),
        (b"\x80\0\0\0\xff\xff\xff\xfe", 0xFFFFFFFE),
        (b"\xff\xff\xff\xff\xff\xff\xff\xff", -1),
        (b"\xff" * 11 + b"\0", -256),
    ],
)
def test_numbers_are_octal_or_base_256(field: bytes, value: int) -> None:
    assert parse_number(field) == value


@pytest.mark.parametrize(
    "field", [b"0000648\0", b"-0000644", b"0o644\0\0\0", b"6_44\0\0\0\0", b"x" * 8]
)
def test_other_numbers_are_errors(field: bytes) -> None:
    with pytest.raises(TarError, match="octal"):
        scan(header(uid=field))


@given(st.integers(-(1 << 62), (1 << 62) - 1))
def test_base_256_numbers_round_trip(value: int) -> None:
    assert parse_number(base256(value, 12)) == value
    assert parse_number(base256(value, 8)) == value


def test_ustar_and_star_prefixes_come_before_the_name() -> None:
    assert only(header(b"name", prefix=b"p" * 155)).name == b"p" * 155 + b"/name"
    star = header(b"name", prefix=b"p".ljust(131, b"\0") + b"1" * 12, tail=b"\0" * 8 + b"tar\0")
    assert only(star).name == b"p/name"


def test_gnu_headers_have_times_where_ustar_has_the_prefix() -> None:
    times = octal(1_700_000_000, 12) + octal(1_700_000_001, 12)
    assert only(header(b"name", magic=GNU, prefix=times)).name == b"name"
    # Go before 1.8 wrote such headers with a prefix.
    assert only(header(b"name", magic=GNU, prefix=b"usr/share")).name == b"usr/share/name"


def test_v7_headers_have_neither_prefix_nor_device_and_directories_by_slash() -> None:
    assert only(header(b"dir/", b"\0", magic=V7, prefix=b"p")).type is EntryType.DIRECTORY
    entry = only(header(b"dev", b"3", magic=V7, major=b"rubbish!"))
    assert (entry.name, entry.type, entry.major) == (b"dev", EntryType.CHARACTER, 0)
    assert only(header(b"file", b"\0", magic=V7)).type is EntryType.REGULAR


def test_names_stay_as_they_are() -> None:
    for name in (b"./a", b"/a", b"a/../b//", b"\xff\x80", b" a\n"):
        assert only(tar(directory(name))).name == name


def test_a_contiguous_file_is_a_regular_one() -> None:
    entry = only(tar(Member(b"f", b"7", b"data")))
    assert (entry.type, entry.segments) == (EntryType.REGULAR, (Segment(0, 512, 4),))


@pytest.mark.parametrize("kind", [b"D", b"M", b"N", b"V", b"A", b"8", b"\xff"])
def test_other_types_are_unsupported(kind: bytes) -> None:
    with pytest.raises(UnsupportedError, match="'f' at byte 0: FirstByte does not handle its type"):
        scan(tar(Member(b"f", kind)))


@pytest.mark.parametrize("kind", [b"1", b"2", b"3", b"4", b"5", b"6"])
def test_only_regular_files_have_data_whatever_the_size_field_says(kind: bytes) -> None:
    entries = scan(tar(Member(b"x", kind, size=1234), file(b"next")))
    assert [(e.name, e.size, e.segments) for e in entries] == [(b"x", 0, ()), (b"next", 0, ())]


def test_the_device_numbers_of_devices_are_read() -> None:
    entry = only(tar(Member(b"d", b"4", major=259, minor=70_000)))
    assert (entry.type, entry.major, entry.minor) == (EntryType.BLOCK, 259, 70_000)


@pytest.mark.parametrize("gnu", [True, False])
@pytest.mark.parametrize("seconds", [-(2**40), -1, 2**31, 2**33, 2**40])
def test_times_before_1970_and_after_2038(gnu: bool, seconds: int) -> None:
    assert only(tar(file(b"f", mtime_ns=seconds * SECOND, gnu=gnu))).mtime_ns == seconds * SECOND


@pytest.mark.parametrize("gnu", [True, False])
def test_owners_beyond_16_bits_and_up_to_the_largest(gnu: bool) -> None:
    entry = only(tar(file(b"f", uid=0xFFFF_FFFE, gid=70_000, gnu=gnu)))
    assert (entry.uid, entry.gid) == (0xFFFF_FFFE, 70_000)
    with pytest.raises(TarError, match="owner"):
        scan(tar(file(b"f", uid=0xFFFF_FFFF, gnu=gnu)))


@pytest.mark.parametrize("gnu", [True, False])
def test_files_over_8_gib_are_skipped_without_their_data(gnu: bool) -> None:
    size = (9 << 30) + 1
    scanner = TarScanner()
    (entry,) = scanner.feed(encode(file(b"f", size=size, gnu=gnu)))
    assert entry.size == size
    assert entry.segments[0].length == size
    with pytest.raises(TarError, match="ends in the middle"):
        scanner.finish()


def test_sizes_that_erofs_cannot_address_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="size"):
        scan(tar(file(b"f", size=MAX_SIZE)))
    with pytest.raises(TarError, match="negative"):
        scan(tar(file(b"f", size=-1, gnu=True)))


# --- extended headers -------------------------------------------------------------------------


def test_pax_records_override_the_header() -> None:
    records = (
        (b"path", b"\xffpath"),
        (b"size", b"5"),
        (b"uid", b"70000"),
        (b"gid", b"80000"),
        (b"mtime", b"-1.25"),
        (b"comment", b"ignored"),
    )
    entry = only(pax_header(*records) + header(b"old", size=octal(0, 12)) + padded(b"12345") + END)
    assert (entry.name, entry.size, entry.uid, entry.gid) == (b"\xffpath", 5, 70_000, 80_000)
    assert entry.mtime_ns == -1_250_000_000
    link = only(pax_header((b"linkpath", b"t" * 300)) + header(b"l", b"2", linkname=b"old"))
    assert link.linkname == b"t" * 300


def test_pax_records_concern_one_member_and_empty_values_change_nothing() -> None:
    extended = pax_header((b"path", b"first"), (b"uid", b""))
    entries = scan(extended + encode(file(b"a", uid=3)) + tar(file(b"second")))
    assert [(entry.name, entry.uid) for entry in entries] == [(b"first", 3), (b"second", 0)]


def test_global_headers_are_checked_and_not_applied() -> None:
    extended = pax_header((b"path", b"global"), (b"uid", b"9"), kind=b"g")
    entry = only(extended + tar(file(b"own")))
    assert (entry.name, entry.uid) == (b"own", 0)
    with pytest.raises(TarError, match="PAX record"):
        scan(header(b"g", b"g", size=octal(3, 12)) + padded(b"bad") + tar(file(b"own")))


def test_xattrs_are_kept_byte_for_byte() -> None:
    xattrs = {
        b"user.binary": bytes(range(256)),
        b"user.newline": b"a\n12 path=b\n",
        b"user.equals": b"=",
        b"user.empty": b"",
        b"security.capability": CAPABILITY,
    }
    assert only(tar(file(b"f", xattrs=xattrs))).xattrs == xattrs


@given(st.lists(st.tuples(st.text("abc.", min_size=1).map(str.encode), st.binary())))
def test_pax_records_round_trip(records: list[tuple[bytes, bytes]]) -> None:
    data = pax_header(*records)
    size = parse_number(data[124:136])
    assert parse_records(data[512 : 512 + size]) == records


@pytest.mark.parametrize(
    "data",
    [
        b"path=x\n",
        b"x path=x\n",
        b"99 path=x\n",
        b"8 path=x\n",
        b"10 path=x ",
        b"5 =x\n",
        b"7 path\n",
        b"0 path=x\n",
        b"11 path=\0x\n",
        b"10 a\0b=x\n\n",
        b"-9 a=b\n",
        b"9" * 5000,
        b"12 uid=12x4\n",
        b"12 uid=1_00\n",
        b"12 mtime=.\n",
        b"15 mtime=1e10\n",
        b"14 mtime=1.-5\n",
        b"30 size=9999999999999999999\n",
    ],
)
def test_malformed_pax_records_are_errors(data: bytes) -> None:
    extended = header(b"x", b"x", size=octal(len(data), 12)) + padded(data)
    with pytest.raises(TarError, match="PAX"):
        scan(extended + tar(file(b"f")))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (b"0", 0),
        (b"1.5", 1_500_000_000),
        (b"-1.5", -1_500_000_000),
        (b"-0.5", -500_000_000),
        (b"1.", SECOND),
        (b"1.1234567899", 1_123_456_789),
        (b"4102444800.000000001", 4_102_444_800_000_000_001),
    ],
)
def test_pax_times_have_nanoseconds(text: bytes, value: int) -> None:
    assert parse_time(text) == value


def test_gnu_long_names_and_targets() -> None:
    name, target = b"n\xff" * 200, b"t" * 500
    entry = only(gnu_long(b"K", target) + gnu_long(b"L", name) + tar(symlink(b"short", b"x")))
    assert (entry.name, entry.linkname) == (name, target)
    entry = only(tar(hardlink(name, target, gnu=True)))
    assert (entry.name, entry.linkname) == (name, target)


@pytest.mark.parametrize("kind", [b"x", b"g", b"L", b"K"])
def test_extended_headers_are_bounded(kind: bytes) -> None:
    with pytest.raises(TarError, match="1048576"):
        scan(header(b"x", kind, size=octal((1 << 20) + 1, 12)))
