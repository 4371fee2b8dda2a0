"""The file index as bytes: layout, both forms, digests, and refusal of what is malformed."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from index import format as fbx
from index.errors import FirstByteError, FormatError, IntegrityError, UnsupportedError
from index.format import Encoding, Section
from index.tables import CHUNK_SIZE, Codec, LayerTable


def layer(seed: int, chunks: int = 3, windows: int = 2) -> tuple[LayerTable, list[bytes]]:
    """A gzip layer of made-up digests with `windows` seek points behind the first."""
    raw = bytes([seed]) * 32
    points = windows + 1
    table = LayerTable(
        digest=hashlib.sha256(raw).digest(),
        diff_id=hashlib.sha256(raw + b"raw").digest(),
        codec=Codec.GZIP,
        blob_size=1000 * points,
        raw_size=chunks * CHUNK_SIZE - 100,
        raw_offsets=[number * 1000 for number in range(points)],
        bit_offsets=[80 + number * 7777 for number in range(points)],
        window_flags=bytes([0] + [1] * windows),
        digests=b"".join(hashlib.sha256(bytes([seed, n])).digest() for n in range(chunks)),
    )
    return table, [bytes([seed, n]) * (fbx.WINDOW_SIZE // 2) for n in range(windows)]


def content(tree: bytes = b"tree" * 1000, layers: int = 2) -> dict[Section, fbx.Stored]:
    made = [layer(seed) for seed in range(layers)]
    return fbx.lay_out(tree, [table for table, _ in made], [windows for _, windows in made])


def test_both_forms_have_the_same_digest_and_sections() -> None:
    built = content()
    travelling = fbx.write(fbx.compress(built))
    expanded = fbx.write_expanded(fbx.expand(fbx.read(travelling)))
    assert fbx.index_digest(fbx.read(travelling)) == fbx.index_digest(built)
    assert expanded == fbx.write_expanded(built)
    assert fbx.index_digest(fbx.read(expanded)) == fbx.index_digest(built)
    assert len(travelling) < len(expanded)


def test_an_expanded_file_notices_every_flipped_byte_of_its_sections() -> None:
    expanded = fbx.write_expanded(content(tree=b"abc", layers=1))
    assert fbx.intact(expanded, fbx.read(expanded))
    for stored in fbx.read(expanded).values():
        for place in (0, len(stored.data) // 2, len(stored.data) - 1):
            damaged = bytearray(expanded)
            damaged[expanded.index(bytes(stored.data)) + place] ^= 1
            assert not fbx.intact(bytes(damaged), fbx.read(bytes(damaged)))


def test_a_file_without_checksums_is_not_taken_for_intact() -> None:
    file = fbx.write(content())
    assert not fbx.intact(file, fbx.read(file))


def test_the_digest_tells_apart_what_differs_in_any_section() -> None:
    digests = {
        fbx.index_digest(content()),
        fbx.index_digest(content(tree=b"Tree" * 1000)),
        fbx.index_digest(content(layers=1)),
        fbx.index_digest(content(layers=3)),
    }
    assert len(digests) == 4


def test_the_digest_of_a_section_is_that_of_its_4_mib_pieces() -> None:
    data = bytes(range(256)) * (40 << 10)  # 10 MiB: two pieces and a half
    pieces = [data[: 4 << 20], data[4 << 20 : 8 << 20], data[8 << 20 :]]
    joined = b"".join(hashlib.sha256(piece).digest() for piece in pieces)
    assert fbx.section_digest(data) == hashlib.sha256(joined).digest()


def test_each_window_can_be_read_by_itself() -> None:
    stored = fbx.read(fbx.write(fbx.compress(content())))[Section.WINDOWS]
    frames = fbx.window_frames(stored)
    assert [fbx.decompress(frame, fbx.WINDOW_SIZE)[:2] for frame in frames] == [
        b"\0\0",
        b"\0\1",
        b"\1\0",
        b"\1\1",
    ]


def test_windows_shorter_than_32_kib_are_padded_in_front() -> None:
    table, windows = layer(1, windows=1)
    stored = fbx.lay_out(b"", [table], [[b"end"]])[Section.WINDOWS]
    (frame,) = fbx.window_frames(stored)
    assert fbx.decompress(frame, fbx.WINDOW_SIZE) == b"end".rjust(fbx.WINDOW_SIZE, b"\0")
    assert len(windows) == 1


def test_all_windows_are_verified_however_many_pieces_they_fill() -> None:
    table, windows = layer(1, windows=200)
    built = fbx.lay_out(b"tree", [table], [windows])
    raw = b"".join(windows)
    assert len(raw) > fbx.DIGEST_PIECE
    assert built[Section.WINDOWS].digest == fbx.section_digest(raw)
    fbx.expand(built)
    frames = [bytes(frame) for frame in fbx.window_frames(built[Section.WINDOWS])]
    for number in (0, 127, 128, 199):
        other = frames.copy()
        other[number] = frames[number - 1]
        lengths = b"".join(fbx.WINDOW_LENGTH.pack(len(frame)) for frame in other)
        stored = dataclasses.replace(built[Section.WINDOWS], data=lengths + b"".join(other))
        with pytest.raises(IntegrityError, match="WINDOWS"):
            fbx.expand(built | {Section.WINDOWS: stored})


def test_optional_sections_of_later_versions_are_passed_over() -> None:
    built = content()
    later = dict(built)
    extra = fbx.Stored(Encoding.PLAIN, b"profile", 7, fbx.section_digest(b"profile"))
    later[fbx.OPTIONAL_SECTION | 9] = extra  # type: ignore[index]
    assert fbx.index_digest(fbx.read(fbx.write(later))) == fbx.index_digest(built)


def test_other_versions_features_and_sections_are_refused_with_advice() -> None:
    file = bytearray(fbx.write(content()))
    for offset, value in ((8, 2), (12, 1), (fbx.HEADER.size, 77)):
        broken = file.copy()
        broken[offset] = value
        with pytest.raises(UnsupportedError) as caught:
            fbx.read(bytes(broken))
        assert caught.value.hint


@pytest.mark.parametrize("length", [0, 7, fbx.HEADER.size - 1, 200])
def test_truncated_files_are_refused(length: int) -> None:
    with pytest.raises(FormatError):
        fbx.read(fbx.write(content())[:length])


def test_every_flipped_byte_of_the_travelling_form_is_noticed() -> None:
    built = content(tree=b"abc", layers=1)
    file = fbx.write(fbx.compress(built))
    padding = {
        position
        for position in range(fbx.HEADER.size + 5 * fbx.SECTION.size, len(file))
        if not any(_covers(file, stored, position) for stored in fbx.read(file).values())
    }
    ignored = {10, 11, *range(16, 20), *padding}  # minor version, compatible features
    for position in range(len(file)):
        if position in ignored:
            continue
        flipped = bytearray(file)
        flipped[position] ^= 0x40
        try:
            same = fbx.index_digest(fbx.expand(fbx.read(bytes(flipped)))) == fbx.index_digest(built)
        except FirstByteError:
            continue
        assert not same, f"byte {position}"


def _covers(file: bytes, stored: fbx.Stored, position: int) -> bool:
    assert isinstance(stored.data, memoryview)
    start = file.find(bytes(stored.data)) if stored.data else 0
    return start <= position < start + len(stored.data)


def test_a_section_that_unfolds_to_more_than_it_says_is_refused() -> None:
    packed = fbx.compress(content())
    bomb = fbx.Stored(Encoding.ZSTD, packed[Section.TREE].data, 5, packed[Section.TREE].digest)
    with pytest.raises(FormatError):
        fbx.expand(packed | {Section.TREE: bomb})


def test_an_index_that_would_unfold_beyond_the_limit_is_refused_before_it_does() -> None:
    with pytest.raises(FormatError, match="more than 100 bytes"):
        fbx.expand(fbx.compress(content()), limit=100)


def test_damage_names_the_section() -> None:
    built = content()
    wrong = fbx.Stored(Encoding.PLAIN, b"x" * built[Section.TREE].raw_size, 4000, b"\0" * 32)
    with pytest.raises(IntegrityError, match="TREE"):
        fbx.expand(built | {Section.TREE: wrong})


@settings(max_examples=150)
@given(st.data())
def test_no_mutation_raises_anything_but_our_errors(data: st.DataObject) -> None:
    file = bytearray(fbx.write(fbx.compress(content())))
    for _ in range(data.draw(st.integers(1, 5))):
        position = data.draw(st.integers(0, min(len(file) - 1, 600)))
        file[position] = data.draw(st.integers(0, 255))
    with contextlib.suppress(FirstByteError):
        fbx.expand(fbx.read(bytes(file)), limit=1 << 24)


@given(st.binary(max_size=400))
def test_garbage_behind_the_magic_is_refused(garbage: bytes) -> None:
    with pytest.raises(FirstByteError):
        fbx.read(fbx.MAGIC + garbage)


@given(
    st.lists(st.integers(0, 2**40), max_size=5),
    st.lists(st.integers(0, 2**43), max_size=5),
    st.binary(max_size=5),
    st.integers(0, 2**42),
    st.sampled_from(Codec),
)
def test_layer_tables_that_contradict_themselves_are_refused(
    raw: list[int], bits: list[int], flags: bytes, size: int, codec: Codec
) -> None:
    """`check` raises FormatError or the table's spans are sound."""
    table = LayerTable(
        digest=b"",
        diff_id=b"",
        codec=codec,
        blob_size=size,
        raw_size=min(size, 10 * CHUNK_SIZE),
        raw_offsets=raw,
        bit_offsets=bits,
        window_flags=flags,
        digests=bytes(32 * -(-min(size, 10 * CHUNK_SIZE) // CHUNK_SIZE)),
    )
    try:
        table.check()
    except FormatError:
        return
    for chunk in range(table.chunk_count):
        span = table.span(chunk, chunk)
        assert span.raw_start <= chunk * CHUNK_SIZE < span.raw_end <= table.raw_size
        assert 0 <= span.start <= span.end <= table.blob_size


def test_the_header_is_as_documented() -> None:
    file = fbx.write(content())
    assert file[:8] == b"\x89FBX\r\n\x1a\n"
    assert struct.unpack_from("<HHIIIQ", file, 8) == (1, 0, 0, 0, 5, len(file))
