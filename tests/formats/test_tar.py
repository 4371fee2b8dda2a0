"""The scanner reads what tar programs write, in pieces of any size, and never fails by surprise."""

from __future__ import annotations

import io
import subprocess
import tarfile
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from index.entry import EntryType
from index.errors import FirstByteError, TarError
from index.tar import TarScanner
from tests.support.awkward import awkward_layers, huge_layers, layers_beyond_umoci
from tests.support.merged import content, merge, scan
from tests.support.tars import (
    END,
    SECOND,
    encode,
    file,
    pax_header,
    tar,
)

if TYPE_CHECKING:
    from pathlib import Path


# --- archives that tarfile writes -------------------------------------------------------------

_TEXT = st.text(st.characters(blacklist_characters="\0", codec="utf-8"), min_size=1, max_size=130)
_TYPES = {
    tarfile.REGTYPE: EntryType.REGULAR,
    tarfile.DIRTYPE: EntryType.DIRECTORY,
    tarfile.SYMTYPE: EntryType.SYMLINK,
    tarfile.LNKTYPE: EntryType.HARDLINK,
    tarfile.CHRTYPE: EntryType.CHARACTER,
    tarfile.BLKTYPE: EntryType.BLOCK,
    tarfile.FIFOTYPE: EntryType.FIFO,
}


@st.composite
def _archives(draw: st.DrawFn) -> tuple[bytes, list[tuple[tarfile.TarInfo, bytes]]]:
    """An archive, and what was asked of tarfile to put into it."""
    kind = draw(st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT]))
    is_ustar = kind == tarfile.USTAR_FORMAT
    large = 0o777_7777 if is_ustar else (1 << 32) - 2
    buffer = io.BytesIO()
    members = []
    with tarfile.open(fileobj=buffer, mode="w", format=kind) as archive:
        for _ in range(draw(st.integers(0, 4))):
            name = draw(st.text("abc/.", min_size=1, max_size=90) if is_ustar else _TEXT)
            member = tarfile.TarInfo(name)
            member.type = draw(st.sampled_from(list(_TYPES)))
            member.mode = draw(st.integers(0, 0o7777))
            member.uid = draw(st.integers(0, large))
            member.gid = draw(st.integers(0, large))
            member.mtime = draw(st.integers(0 if is_ustar else -(2**40), 2**33 - 1))
            member.devmajor, member.devminor = draw(st.integers(0, 4095)), draw(st.integers(0, 255))
            if member.type in (tarfile.SYMTYPE, tarfile.LNKTYPE):
                member.linkname = draw(
                    st.text("xyz/.", min_size=1, max_size=100 if is_ustar else 130)
                )
            data = b""
            if member.type == tarfile.REGTYPE:
                data = draw(st.binary(max_size=1500))
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
            members.append((member, data))
    return buffer.getvalue(), members


@settings(max_examples=150)
@given(_archives(), st.integers(1, 2000))
def test_what_tarfile_writes_is_read_back_in_pieces_of_any_size(
    written: tuple[bytes, list[tuple[tarfile.TarInfo, bytes]]], piece: int
) -> None:
    archive, members = written
    entries = scan(archive, piece)
    assert len(entries) == len(members)
    for entry, (member, data) in zip(entries, members, strict=True):
        assert entry.name.rstrip(b"/") == member.name.encode().rstrip(b"/")
        assert entry.type is _TYPES[member.type]
        assert (entry.mode, entry.uid, entry.gid) == (member.mode, member.uid, member.gid)
        assert entry.mtime_ns == int(member.mtime) * SECOND
        assert entry.linkname == member.linkname.encode()
        if entry.type in (EntryType.CHARACTER, EntryType.BLOCK):
            assert (entry.major, entry.minor) == (member.devmajor, member.devminor)
        assert entry.size == len(data)
        stored = [archive[s.raw_offset : s.raw_offset + s.length] for s in entry.segments]
        assert b"".join(stored) == data


@pytest.mark.parametrize("form", ["v7", "oldgnu", "gnu", "ustar", "posix"])
def test_what_gnu_tar_writes_is_read_with_sparse_files(tmp_path: Path, form: str) -> None:
    source = tmp_path / "source"
    source.mkdir()
    long_name = "n" * (90 if form in ("v7", "ustar") else 200)
    (source / long_name).write_bytes(b"long")
    with (source / "holes").open("wb") as holes:
        for number in range(40):
            holes.seek(number * 65_536)
            holes.write(b"%d" % number * 100)
        holes.truncate(50 * 65_536)
    sparse = [] if form in ("v7", "ustar") else ["--sparse"]
    command = ["tar", "-C", str(source), f"--format={form}", "--sort=name", *sparse, "-c", "."]
    archive = subprocess.run(command, check=True, capture_output=True).stdout
    root = merge([archive])
    assert set(root.children) == {b"holes", long_name.encode()}
    assert content(root.children[b"holes"], [archive]) == (source / "holes").read_bytes()
    if sparse:
        assert len(root.children[b"holes"].extents) == 40


@pytest.mark.parametrize("version", ["0.0", "0.1", "1.0"])
def test_what_gnu_tar_writes_in_its_pax_sparse_formats_is_read(
    tmp_path: Path, version: str
) -> None:
    with (tmp_path / "holes").open("wb") as holes:
        holes.write(b"start" * 1000)
        holes.seek(1 << 20)
        holes.write(b"end")
    command = ["tar", "-C", str(tmp_path), "--format=posix", "--sparse"]
    command += [f"--sparse-version={version}", "-c", "holes"]
    archive = subprocess.run(command, check=True, capture_output=True).stdout
    root = merge([archive])
    assert content(root.children[b"holes"], [archive]) == (tmp_path / "holes").read_bytes()


# --- pieces -----------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [awkward_layers, layers_beyond_umoci, huge_layers])
@pytest.mark.parametrize("piece", [1, 511, 513, 4096])
def test_the_size_of_pieces_does_not_matter(layers: Any, piece: int) -> None:
    for archive in layers():
        assert scan(archive, piece) == scan(archive)


def test_entries_come_as_soon_as_their_header_is_complete() -> None:
    archive = tar(file(b"a", b"x" * 5000), file(b"b"))
    scanner = TarScanner()
    assert scanner.feed(archive[:511]) == []
    assert [entry.name for entry in scanner.feed(memoryview(archive)[511:512])] == [b"a"]
    assert scanner.feed(archive[512:5632]) == []
    assert [entry.name for entry in scanner.feed(archive[5632:])] == [b"b"]
    scanner.finish()


# --- ends -------------------------------------------------------------------------------------

_MEMBER = encode(file(b"f", b"data"))


@pytest.mark.parametrize(
    ("archive", "count"),
    [
        (b"", 0),
        (END, 0),
        (_MEMBER, 1),
        (_MEMBER + bytes(512), 1),
        (_MEMBER + END, 1),
        (_MEMBER + END + b"anything" * 1000, 1),
        (_MEMBER + END + _MEMBER, 1),
    ],
    ids=[
        "empty",
        "zeros",
        "no zeros",
        "one block",
        "two blocks",
        "rubbish behind",
        "member behind",
    ],
)
def test_where_an_archive_may_end(archive: bytes, count: int) -> None:
    assert len(scan(archive)) == count


@pytest.mark.parametrize("end", [1, 511, 513, 515, 1000])
def test_an_archive_that_ends_inside_a_member_is_an_error(end: int) -> None:
    with pytest.raises(TarError, match="byte 1024: the archive ends"):
        scan(_MEMBER + _MEMBER[:end])


def test_the_error_names_the_member_and_where_it_starts() -> None:
    with pytest.raises(
        TarError, match=r"^tar member 'f' at byte 0: the archive ends in the middle"
    ):
        scan(_MEMBER[:515])


def test_an_extended_header_without_its_member_is_an_error() -> None:
    extended = pax_header((b"path", b"x"))
    for rest in (b"", END):
        with pytest.raises(TarError):
            scan(extended + rest)


def test_a_single_block_of_zeros_inside_is_an_error() -> None:
    with pytest.raises(TarError, match="zeros"):
        scan(_MEMBER + bytes(512) + _MEMBER)


def test_a_scanner_that_failed_stays_failed() -> None:
    scanner = TarScanner()
    with pytest.raises(TarError) as first:
        scanner.feed(b"\1" * 512)
    with pytest.raises(TarError) as second:
        scanner.feed(_MEMBER)
    with pytest.raises(TarError) as third:
        scanner.finish()
    assert first.value is second.value is third.value


# --- rubbish ----------------------------------------------------------------------------------


def _scan_anything(data: bytes, piece: int) -> None:
    """Scan; errors of other kinds than ours go through, and so do messages of several lines."""
    try:
        scan(data, piece)
    except FirstByteError as error:
        if "\n" in str(error):
            raise ValueError("a message of several lines") from error


@given(st.binary(max_size=3000), st.integers(1, 3000))
def test_random_bytes_give_entries_or_a_first_byte_error(data: bytes, piece: int) -> None:
    _scan_anything(data, piece)


_SAMPLES = [*awkward_layers(), *layers_beyond_umoci(), *huge_layers()]


@settings(max_examples=300)
@given(st.sampled_from(_SAMPLES), st.data())
def test_damaged_archives_give_entries_or_a_first_byte_error(archive: bytes, data: Any) -> None:
    damaged = bytearray(archive)
    for _ in range(data.draw(st.integers(1, 3))):
        if damaged:
            start = data.draw(st.integers(0, len(damaged) - 1))
            damaged[start : start + data.draw(st.integers(0, 600))] = data.draw(
                st.binary(max_size=20)
            )
    _scan_anything(bytes(damaged), data.draw(st.sampled_from([97, 512, 1 << 20])))


@settings(max_examples=300)
@given(st.sampled_from(_SAMPLES), st.data())
def test_damaged_headers_with_right_checksums_give_entries_or_a_first_byte_error(
    archive: bytes, data: Any
) -> None:
    blocks = len(archive) // 512
    if not blocks:
        return
    start = 512 * data.draw(st.integers(0, min(blocks - 1, 60)))
    block = bytearray(archive[start : start + 512])
    offset = data.draw(st.integers(0, 511))
    patch = data.draw(st.binary(min_size=1, max_size=24))
    block[offset : offset + len(patch)] = patch
    del block[512:]
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    _scan_anything(archive[:start] + block + archive[start + 512 :], 1 << 20)
