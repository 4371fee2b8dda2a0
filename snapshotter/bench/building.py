"""How fast file indexes are built, where the time goes, and how large they get."""

from __future__ import annotations

import hashlib
import zlib
from functools import partial
from typing import TYPE_CHECKING

import trio
import zstandard

from index import codecs
from index import format as fbx
from index.convert import DEFAULT_LEVELS, FrameWriter
from index.erofs import writer
from index.layer import LayerScanner
from index.merge import Merger
from index.tables import CHUNK_SIZE, MAX_RAW_SIZE, Codec
from index.tar import TarScanner
from snapshotter.bench.images import PIECE, read_pieces
from snapshotter.bench.tables import Cell, Table
from snapshotter.bench.timing import Timing, interleaved, median, once
from snapshotter.images.indexing import build_index
from snapshotter.registry.layout import Layout
from snapshotter.registry.platform import Platform

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from index.entry import Entry
    from index.file import FileIndex
    from index.layer import LayerScan
    from snapshotter.bench.corpus import RawLayer
    from snapshotter.bench.images import StoredImage

_GZIP_WITH_HEADER = 31  # window bits of zlib.h
_FRAME_SIZES = (CHUNK_SIZE, 2 * CHUNK_SIZE, 4 * CHUNK_SIZE)


def throughput(images: Sequence[StoredImage], samples: int) -> Table:
    """Decompressing alone, scanning layer after layer, and building a whole index."""
    works: dict[tuple[StoredImage, str], Callable[[], Timing]] = {}
    for image in images:
        works[image, "decompress only"] = partial(once, partial(_decompress, image))
        works[image, "scan layer by layer"] = partial(once, partial(_scan, image.blobs))
        works[image, "build the index"] = partial(once, partial(build, image))
    for work in works.values():
        work()  # reads the blobs into the page cache
    timings = interleaved(samples, works)
    rows = []
    for (image, what), measured in timings.items():
        typical = median(measured)
        rows.append(
            (
                image.form.name,
                what,
                image.raw_size / 1e6 / typical.seconds,
                image.size / 1e6 / typical.seconds,
                typical.cpu_seconds / (image.raw_size / 1e9),
            )
        )
    return Table(
        "Building a file index",
        ("layers", "work", "raw MB/s", "compressed MB/s", "CPU s per raw GB"),
        tuple(rows),
        f"{images[0].entries} files in {len(images[0].blobs)} layers, "
        f"{images[0].raw_size / 1e6:.0f} MB of raw space; medians of {samples} rounds, page cache "
        "warm. Decompressing and scanning take one layer at a time, building all of them.",
    )


def parts(image: StoredImage, layers: Sequence[RawLayer], samples: int) -> Table:
    """What each part of building the index of a gzip image costs, run by itself."""
    scans = _scan(image.blobs)
    tree = _merge(scans)
    tables = [scan.table for scan, _ in scans]
    windows = [scan.windows for scan, _ in scans]
    content = fbx.lay_out(tree, tables, windows)
    works: dict[str, Callable[[], object]] = {
        "decompress (zlib)": partial(_decompress, image),
        "decompress and find checkpoints": partial(_find_points, image),
        "parse the tars": partial(_parse_tars, layers),
        "hash raw space, twice": partial(_hash, layers),
        "merge, write the tree": partial(_merge, scans),
        "compress the windows, hash sections": partial(fbx.lay_out, tree, tables, windows),
        "compress the other sections": partial(fbx.compress, content),
    }
    timings = interleaved(samples, {what: partial(once, work) for what, work in works.items()})
    return Table(
        "Parts of building the index of a gzip image",
        ("part", "CPU s per raw GB", "raw MB per CPU s"),
        tuple(
            (what, cpu / (image.raw_size / 1e9), image.raw_size / 1e6 / cpu)
            for what, measured in timings.items()
            for cpu in (median(measured).cpu_seconds,)
        ),
        "The second contains the first. Hashing runs on a thread of its own beside the others.",
    )


def sizes(images: Sequence[StoredImage]) -> Table:
    """The index as it travels, by section."""
    names = ("tree", "digests", "seek", "windows")
    rows: list[tuple[Cell, ...]] = []
    for image in images:
        packed = build(image).packed()
        held = {
            section.name.lower(): len(stored.data) for section, stored in fbx.read(packed).items()
        }
        rows.append(
            (
                image.form.name,
                image.size / 1e6,
                len(packed) / 1e3,
                len(packed) / 1e3 / (image.entries / 1e3),
                100 * len(packed) / image.size,
                *(held[name] / 1e3 for name in names),
            )
        )
    return Table(
        "Size of a file index as it travels",
        (
            "layers",
            "image MB",
            "index KB",
            "KB per 1000 files",
            "% of the image",
            *(f"{name} KB" for name in names),
        ),
        tuple(rows),
        f"{images[0].entries} files, {images[0].raw_size / 1e6:.0f} MB of raw space.",
    )


def frames(layers: Sequence[RawLayer], gzip_size: int) -> Table:
    """What cutting zstd layers into frames costs in size."""
    level = DEFAULT_LEVELS[Codec.ZSTD]
    one = sum(_stream_size(layer.path, level) for layer in layers)
    found = {f"{size >> 10} KiB": _frames_size(layers, level, size) for size in _FRAME_SIZES}
    found["one frame a layer"] = one
    return Table(
        f"Size of zstd layers by frame size, level {level}",
        ("frames of", "MB", "% more than one frame", "% more than gzip -6"),
        tuple(
            (name, size / 1e6, 100 * (size / one - 1), 100 * (size / gzip_size - 1))
            for name, size in found.items()
        ),
    )


def build(image: StoredImage) -> FileIndex:
    """Build the index as `firstbyte index build` does, on all cores."""

    async def run() -> FileIndex:
        layout = Layout(image.layout)
        return await build_index(layout, await layout.resolve(Platform.host()))

    return trio.run(run)


def _decompress(image: StoredImage) -> None:
    """With the library that the scanner uses, and nothing else."""
    for path in image.blobs:
        if image.form.codec is Codec.GZIP:
            inflater = zlib.decompressobj(_GZIP_WITH_HEADER)
            for piece in read_pieces(path):
                while piece:
                    inflater.decompress(piece, PIECE)
                    piece = inflater.unconsumed_tail
        else:
            with path.open("rb") as file:
                reader = zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True)
                while reader.read(PIECE):
                    pass


def _scan(blobs: Sequence[Path]) -> list[tuple[LayerScan, list[Entry]]]:
    scans = []
    for path in blobs:
        scanner = LayerScanner()
        entries: list[Entry] = []
        for piece in read_pieces(path):
            entries += scanner.feed(piece)
        scans.append((scanner.finish(), entries))
    return scans


def _find_points(image: StoredImage) -> None:
    for path in image.blobs:
        scanner = codecs.scanner(image.form.codec, limit=MAX_RAW_SIZE)
        for piece in read_pieces(path):
            for _ in scanner.feed(piece):
                pass
        scanner.finish()


def _parse_tars(layers: Sequence[RawLayer]) -> None:
    for layer in layers:
        scanner = TarScanner()
        for piece in read_pieces(layer.path):
            scanner.feed(piece)
        scanner.finish()


def _hash(layers: Sequence[RawLayer]) -> None:
    """All of it, and each chunk."""
    for layer in layers:
        whole = hashlib.sha256()
        for piece in read_pieces(layer.path):
            whole.update(piece)
            for start in range(0, len(piece), CHUNK_SIZE):
                hashlib.sha256(piece[start : start + CHUNK_SIZE]).digest()


def _merge(scans: Sequence[tuple[LayerScan, list[Entry]]]) -> bytes:
    merger = Merger()
    for number, (_, entries) in enumerate(scans):
        merger.apply(number, entries)
    return writer.write(merger.finish(), [scan.table.raw_size for scan, _ in scans])


def _stream_size(path: Path, level: int) -> int:
    compressor = zstandard.ZstdCompressor(level=level).compressobj()
    size = sum(len(compressor.compress(piece)) for piece in read_pieces(path))
    return size + len(compressor.flush())


def _frames_size(layers: Sequence[RawLayer], level: int, frame_size: int) -> int:
    total = 0
    for layer in layers:
        frame_writer = FrameWriter(Codec.ZSTD, level=level, frame_size=frame_size)
        total += sum(len(frame_writer.feed(piece)) for piece in read_pieces(layer.path))
        total += len(frame_writer.finish())
    return total
