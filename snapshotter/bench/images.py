"""The corpus as images in OCI layouts, one for each way to compress its layers."""

from __future__ import annotations

import hashlib
import os
import zlib
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import msgspec
import trio
import zstandard

from index.convert import DEFAULT_LEVELS, FRAME_SIZE, FrameWriter
from index.tables import Codec
from snapshotter.images.conversion import MEDIA_TYPES
from snapshotter.registry.digests import digest_of
from snapshotter.registry.image import body_of
from snapshotter.registry.layout import Layout
from snapshotter.registry.manifest import OCI_CONFIG, OCI_LAYER, Descriptor, Manifest
from snapshotter.registry.platform import Platform
from snapshotter.registry.reference import LAYOUT_PREFIX

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Sequence
    from pathlib import Path

    from snapshotter.bench.corpus import RawLayer
    from snapshotter.registry.image import ImageSink, ImageSource, ResolvedImage

PIECE = 1 << 20  # bytes of a file that are read at once

_GZIP_LEVEL = 6  # what image builders use
_ZSTD_LEVEL = 3  # likewise
_WITH_GZIP_HEADER = 31  # window bits of zlib.h


@dataclass(frozen=True, slots=True)
class Form:
    """A way to compress a layer, and the media type that this gives it."""

    name: str
    codec: Codec
    media_type: str
    compress: Callable[[Iterable[bytes]], Iterator[bytes]]


def _gzip(raw: Iterable[bytes]) -> Iterator[bytes]:
    compressor = zlib.compressobj(_GZIP_LEVEL, wbits=_WITH_GZIP_HEADER)
    for piece in raw:
        yield compressor.compress(piece)
    yield compressor.flush()


def _zstd(raw: Iterable[bytes]) -> Iterator[bytes]:
    compressor = zstandard.ZstdCompressor(level=_ZSTD_LEVEL).compressobj()
    for piece in raw:
        yield compressor.compress(piece)
    yield compressor.flush()


def _zstd_frames(raw: Iterable[bytes]) -> Iterator[bytes]:
    level = DEFAULT_LEVELS[Codec.ZSTD]
    writer = FrameWriter(Codec.ZSTD, level=level, threads=os.cpu_count() or 1)
    for piece in raw:
        yield writer.feed(piece)
    yield writer.finish()


GZIP = Form(f"gzip -{_GZIP_LEVEL}", Codec.GZIP, f"{OCI_LAYER}+gzip", _gzip)
ZSTD = Form(f"zstd -{_ZSTD_LEVEL}, one frame", Codec.ZSTD, MEDIA_TYPES[Codec.ZSTD], _zstd)
ZSTD_FRAMES = Form(
    f"zstd -{DEFAULT_LEVELS[Codec.ZSTD]}, frames of {FRAME_SIZE >> 10} KiB",
    Codec.ZSTD,
    MEDIA_TYPES[Codec.ZSTD],
    _zstd_frames,
)
FORMS = (GZIP, ZSTD, ZSTD_FRAMES)


@dataclass(frozen=True, slots=True)
class StoredImage:
    """An image in a layout of its own. Sizes are bytes, compressed and not."""

    form: Form
    layout: Path
    blobs: tuple[Path, ...]
    size: int
    raw_size: int
    entries: int

    @property
    def reference(self) -> str:
        return f"{LAYOUT_PREFIX}{self.layout}"


def write_image(layout: Path, form: Form, layers: Sequence[RawLayer]) -> StoredImage:
    """Make an image of the layers, compressed in this way, in a new layout."""
    written = trio.run(_write, Layout(layout), form, layers)
    blobs = layout / "blobs" / "sha256"
    return StoredImage(
        form=form,
        layout=layout,
        blobs=tuple(blobs / layer.digest.removeprefix("sha256:") for layer in written),
        size=sum(layer.size for layer in written),
        raw_size=sum(layer.size for layer in layers),
        entries=sum(layer.entries for layer in layers),
    )


def read_pieces(path: Path) -> Iterator[bytes]:
    """A file's content."""
    with path.open("rb") as file:
        while piece := file.read(PIECE):
            yield piece


async def copy_image(source: ImageSource, image: ResolvedImage, sink: ImageSink) -> None:
    """Copy an image, blob by blob, and give it the sink's name."""
    for blob in (image.manifest.config, *image.manifest.layers):
        await sink.write_blob(blob, partial(source.open_range, blob, 0, blob.size))
    await sink.write_manifest(image.manifest, named=True)


async def _write(layout: Layout, form: Form, layers: Sequence[RawLayer]) -> list[Descriptor]:
    written: list[Descriptor] = []
    diff_ids: list[str] = []
    for layer in layers:
        hasher = hashlib.sha256()
        written.append(
            await layout.add_blob(form.media_type, _compressed(layer.path, form, hasher))
        )
        diff_ids.append(f"sha256:{hasher.hexdigest()}")
    platform = Platform.host()
    config = msgspec.json.encode(
        {
            "architecture": platform.architecture,
            "os": platform.os,
            "config": {},
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
        }
    )
    descriptor = Descriptor(media_type=OCI_CONFIG, digest=digest_of(config), size=len(config))
    await layout.write_blob(descriptor, body_of(config))
    manifest = Manifest.build(config=descriptor, layers=written)
    await layout.write_manifest(manifest, named=True)
    return written


async def _compressed(path: Path, form: Form, hasher: hashlib._Hash) -> AsyncGenerator[bytes, None]:
    def hashed() -> Iterator[bytes]:
        for piece in read_pieces(path):
            hasher.update(piece)
            yield piece

    for piece in form.compress(hashed()):
        yield piece
