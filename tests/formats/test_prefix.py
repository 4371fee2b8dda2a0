"""The index of an image's lower layers is the one that a build from those layers gives."""

from __future__ import annotations

import gzip
import random
from typing import TYPE_CHECKING
from unittest.mock import patch

import lz4.frame
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from index.builder import build
from index.codecs import points
from index.entry import Entry, EntryType
from index.errors import TarError, UnsupportedError
from index.file import FileIndex
from index.prefix import cut
from index.tables import Codec
from index.tar import TarScanner
from tests.support.awkward import awkward_layers, huge_layers, layers_beyond_umoci
from tests.support.merged import scan
from tests.support.tars import Member, directory, file, opaque, sparse_pax, tar, whiteout

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

# --- a scanner that is not fed the contents of files --------------------------------------------


def scan_with_skips(archive: bytes, choices: Sequence[int]) -> tuple[list[Entry], int]:
    """All entries, and the bytes that the scanner was fed.

    By turns, as many bytes as `choices` say are skipped if they may be, else fed.
    """
    scanner = TarScanner()
    entries: list[Entry] = []
    position = fed = turn = 0
    while position < len(archive):
        step = min(choices[turn % len(choices)], len(archive) - position)
        turn += 1
        if scanner.skippable:
            step = min(step, scanner.skippable)
            scanner.skip(step)
        else:
            entries += scanner.feed(archive[position : position + step])
            fed += step
        position += step
    scanner.finish()
    return entries, fed


def outcome(scanned: Callable[[], list[Entry]]) -> list[Entry] | str:
    try:
        return scanned()
    except TarError as error:
        return error.message


ARCHIVES = [*awkward_layers(), *layers_beyond_umoci(), *huge_layers()]
STEPS = st.lists(st.sampled_from([1, 7, 511, 512, 513, 3000, 1 << 20]), min_size=1, max_size=5)


@settings(max_examples=150)
@given(st.sampled_from(ARCHIVES), STEPS, st.booleans(), st.data())
def test_skipping_gives_the_entries_that_feeding_gives(
    archive: bytes, steps: list[int], whole: bool, data: st.DataObject
) -> None:
    if not whole:
        archive = archive[: data.draw(st.integers(0, len(archive)))]
    assert outcome(lambda: scan_with_skips(archive, steps)[0]) == outcome(lambda: scan(archive))


def test_nothing_but_headers_and_maps_need_be_fed() -> None:
    page = b"d" * 512
    archive = tar(
        file(b"large", bytes(1 << 20)),
        sparse_pax(b"sparse", 1 << 21, [(0, page * 400), (1 << 20, page * 600)]),
        file(b"small", b"data"),
    )
    _, fed = scan_with_skips(archive + bytes(1 << 20), [512])
    # Each header; two PAX members and a map, of two blocks each; the two that end it.
    assert fed == 512 * (3 + 2 + 1 + 2)


def test_no_more_can_be_skipped_than_the_scanner_would_drop() -> None:
    scanner = TarScanner()
    assert scanner.skippable == 0
    with pytest.raises(ValueError, match="1 bytes to skip of 0"):
        scanner.skip(1)
    scanner.feed(tar(file(b"f", b"x" * 1000))[:512])
    assert scanner.skippable == 1024
    scanner.skip(1000)
    with pytest.raises(ValueError, match="25 bytes to skip of 24"):
        scanner.skip(25)
    with pytest.raises(TarError, match="ends in the middle"):
        scanner.finish()
    with pytest.raises(TarError, match="ends in the middle"):
        scanner.skip(1)


# --- the index of lower layers --------------------------------------------------------------------


def compress(raw: bytes, codec: Codec) -> bytes:
    """A blob with several seek points, if there is enough of `raw`."""
    pieces = [raw[at : at + 300_000] for at in range(0, len(raw), 300_000)] or [b""]
    match codec:
        case Codec.PLAIN:
            return raw
        case Codec.GZIP:
            return gzip.compress(raw, 6, mtime=0)
        case Codec.ZSTD:
            return b"".join(map(zstandard.compress, pieces))
        case Codec.LZ4:
            return b"".join(map(lz4.frame.compress, pieces))


def large_layer(seed: int) -> bytes:
    """One with a gzip window."""
    source = random.Random(seed)
    words = [source.randbytes(source.randrange(3, 30)) for _ in range(500)]
    content = b"".join(source.choices(words, k=400_000))
    return tar(file(b"large-%d" % seed, content), file(b"rewritten", b"by %d" % seed))


def index_of(blobs: Sequence[bytes]) -> FileIndex:
    return build([blob] for blob in blobs)


def assert_each_prefix_is_as_built(layers: Sequence[bytes], blobs: Sequence[bytes]) -> None:
    image = index_of(blobs)
    for depth in range(len(blobs) + 1):
        made = cut(image, [scan(layer) for layer in layers[:depth]])
        assert made.digest == index_of(blobs[:depth]).digest
        assert len(made.layers) == depth
    assert made.digest == image.digest


@pytest.mark.parametrize("shift", range(4))
def test_every_depth_of_awkward_layers_of_every_codec(shift: int) -> None:
    layers = awkward_layers() + layers_beyond_umoci()
    codecs = list(Codec)
    blobs = [compress(layer, codecs[(n + shift) % 4]) for n, layer in enumerate(layers)]
    assert_each_prefix_is_as_built(layers, blobs)


def test_windows_and_seek_points_are_taken_over() -> None:
    layers = [large_layer(seed) for seed in range(4)]
    kinds = (Codec.GZIP, Codec.ZSTD, Codec.GZIP, Codec.LZ4)
    blobs = [compress(layer, codec) for layer, codec in zip(layers, kinds, strict=True)]
    assert_each_prefix_is_as_built(layers, blobs)
    image = index_of(blobs)
    made = cut(image, [scan(layer) for layer in layers[:3]])
    points = [(n, point) for n in range(3) for point in range(len(made.layers[n].window_flags))]
    windows = [made.window(*point) for point in points]
    assert windows == [image.window(*point) for point in points]
    assert sum(window is not None for window in windows) == 2
    # And it travels.
    assert FileIndex.load(made.packed()).digest == made.digest


def test_indexes_of_other_seek_points_describe_the_same() -> None:
    blob = compress(large_layer(1), Codec.GZIP)
    index = index_of([blob])
    with patch.object(points, "MOST_SPACING", 1 << 20):
        denser = index_of([blob])
    assert len(denser.layers[0].raw_offsets) > len(index.layers[0].raw_offsets)
    assert denser.digest != index.digest
    assert denser.describes_the_same(index)
    assert not index.describes_the_same(index_of([compress(large_layer(2), Codec.GZIP)]))
    assert not index.describes_the_same(index_of([blob, blob]))


_PATHS = st.lists(st.sampled_from([b"a", b"b"]), min_size=1, max_size=3).map(b"/".join)
_MEMBERS: st.SearchStrategy[Member] = st.one_of(
    st.builds(file, _PATHS, st.sampled_from([b"", b"1", b"2" * 600])),
    st.builds(directory, _PATHS, mode=st.sampled_from([0o700, 0o755])),
    st.builds(whiteout, _PATHS),
    st.builds(opaque, _PATHS),
)


@given(st.lists(st.lists(_MEMBERS, max_size=6), min_size=1, max_size=4), st.data())
def test_every_depth_of_random_layers(drawn: list[list[Member]], data: st.DataObject) -> None:
    layers: list[bytes] = []
    for members in drawn:
        layer = tar(*members)
        try:
            index_of([*layers, layer])
        except TarError:
            continue
        layers.append(layer)
    kinds = data.draw(st.lists(st.sampled_from(Codec), min_size=len(layers), max_size=len(layers)))
    blobs = [compress(layer, codec) for layer, codec in zip(layers, kinds, strict=True)]
    assert_each_prefix_is_as_built(layers, blobs)


def test_entries_that_cannot_be_applied_are_an_error_with_the_layer() -> None:
    image = index_of([tar(file(b"f")), tar(file(b"g"))])
    below_a_file = Entry(b"f/below", EntryType.DIRECTORY)
    with pytest.raises(TarError) as caught:
        cut(image, [scan(tar(file(b"f"))), [below_a_file]])
    assert image.layers[1].digest.hex() in caught.value.message
    assert "'f/below'" in caught.value.message


def test_data_outside_of_a_layer_is_refused() -> None:
    image = index_of([tar(file(b"f"))])
    longer = scan(tar(file(b"f", bytes(100_000))))
    with pytest.raises(UnsupportedError, match="outside of layer 0"):
        cut(image, [longer])


def test_an_image_has_no_more_lower_layers_than_layers() -> None:
    with pytest.raises(ValueError, match="2 layers of an image that has 1"):
        cut(index_of([tar(file(b"f"))]), [[], []])
