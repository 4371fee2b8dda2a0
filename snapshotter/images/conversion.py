"""Converting an image: the same tars in seekable frames, and the file index pinned by the image."""

from __future__ import annotations

import os
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import msgspec
import trio

from index.builder import IndexBuilder
from index.convert import FrameWriter
from index.errors import IntegrityError, about
from index.layer import LayerScanner
from index.tables import Codec
from snapshotter.images import artifact
from snapshotter.nursery import open_nursery
from snapshotter.registry.image import body_of
from snapshotter.registry.manifest import OCI_CONFIG, OCI_LAYER, Descriptor, Manifest
from snapshotter.registry.reading import read_blob
from snapshotter.registry.retry import RetryPolicy, retry

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    from index.entry import Entry
    from index.file import FileIndex
    from index.layer import LayerScan
    from snapshotter.registry.image import ImageSink, ImageSource, ResolvedImage

MEDIA_TYPES = {Codec.ZSTD: f"{OCI_LAYER}+zstd", Codec.LZ4: f"{OCI_LAYER}+lz4"}
BATCH = 1 << 20  # compressed bytes a thread is given at a time


@dataclass(frozen=True, slots=True)
class Converted:
    """What was written: the new image, its index, and layer sizes before and after, in bytes."""

    image: Descriptor
    index: FileIndex
    size_before: int
    size_after: int


@dataclass(frozen=True, slots=True)
class _Layer:
    descriptor: Descriptor
    scan: LayerScan
    entries: list[Entry]


async def convert(
    source: ImageSource,
    image: ResolvedImage,
    sink: ImageSink,
    *,
    codec: Codec,
    level: int,
    on_progress: Callable[[int], None] = lambda _: None,
) -> Converted:
    """Write `image` to `sink` with every layer recompressed, and its file index beside it.

    The tars, and so the configuration and its diffIDs, stay byte for byte: each new layer is
    decompressed again and compared before the image gets its name. `on_progress` gets the
    compressed bytes read so far. Raises what reading, decoding and writing raise.
    """
    layers: list[_Layer] = []
    done = 0
    for descriptor, diff_id in zip(
        image.manifest.layers, image.config.rootfs.diff_ids, strict=True
    ):
        layers.append(
            await retry(
                # a streamed upload cannot go on in the middle: it starts anew with the layer
                partial(
                    _convert_layer,
                    source,
                    descriptor,
                    diff_id,
                    sink,
                    codec,
                    level,
                    partial(_advance, on_progress, done),
                ),
                RetryPolicy(),
            )
        )
        done += descriptor.size
    index = await trio.to_thread.run_sync(_build, layers)
    packed = await trio.to_thread.run_sync(index.packed)
    blob = artifact.blob_descriptor(packed)
    await sink.write_blob(blob, body_of(packed))
    pin = {artifact.LAYER_ANNOTATION: f"{blob.digest},{blob.size}"}
    config = Descriptor(
        media_type=OCI_CONFIG, digest=image.manifest.config.digest, size=len(image.raw_config)
    )
    await sink.write_blob(config, body_of(image.raw_config))
    manifest = Manifest.build(
        config=config,
        layers=[msgspec.structs.replace(layer.descriptor, annotations=pin) for layer in layers],
        annotations=image.manifest.annotations,
    )
    # Blobs that only an annotation names are garbage to a registry: the artifact keeps it alive.
    await artifact.publish(sink, manifest.descriptor, packed, index.digest)
    written = await sink.write_manifest(manifest, named=True)
    return Converted(
        image=written,
        index=index,
        size_before=sum(layer.size for layer in image.manifest.layers),
        size_after=sum(layer.descriptor.size for layer in layers),
    )


def _build(layers: list[_Layer]) -> FileIndex:
    builder = IndexBuilder()
    for layer in layers:
        builder.add(layer.scan, layer.entries)
    return builder.finish()


async def _convert_layer(
    source: ImageSource,
    layer: Descriptor,
    diff_id: str,
    sink: ImageSink,
    codec: Codec,
    level: int,
    on_progress: Callable[[int], None],
) -> _Layer:
    with about(f"layer {layer.digest}"):
        return await _LayerJob(source, layer, codec, level, on_progress).run(sink, diff_id)


def _advance(on_progress: Callable[[int], None], before: int, done: int) -> None:
    on_progress(before + done)


class _LayerJob:
    """Converts one layer: a task reads, a thread recompresses, the sink's upload writes."""

    def __init__(
        self,
        source: ImageSource,
        layer: Descriptor,
        codec: Codec,
        level: int,
        on_progress: Callable[[int], None],
    ) -> None:
        self._source = source
        self._layer = layer
        self._media_type = MEDIA_TYPES[codec]
        self._on_progress = on_progress
        self._raw: list[bytes] = []
        self._reader = LayerScanner(on_raw=self._raw.append)
        self._writer = FrameWriter(codec, level=level, threads=os.cpu_count() or 1)
        self._checker = LayerScanner(codec)
        self._entries: list[Entry] = []

    async def run(self, sink: ImageSink, diff_id: str) -> _Layer:
        """Convert and upload the layer. Raises IntegrityError if either form is not `diff_id`."""
        sender, receiver = trio.open_memory_channel[bytes](2)

        async def read() -> None:
            done = 0
            batch = bytearray()

            async def consume(piece: bytes) -> None:
                nonlocal done
                batch.extend(piece)
                done += len(piece)
                if len(batch) >= BATCH:
                    await sender.send(await trio.to_thread.run_sync(self._feed, bytes(batch)))
                    batch.clear()
                    self._on_progress(done)

            with sender:
                await read_blob(self._source, self._layer, consume)
                await sender.send(await trio.to_thread.run_sync(self._feed, bytes(batch)))
                await sender.send(await trio.to_thread.run_sync(self._finish))
                self._on_progress(done)

        async def body() -> AsyncGenerator[bytes, None]:
            async for piece in receiver:
                if piece:
                    yield piece

        async with open_nursery() as nursery, aclosing(body()) as pieces:
            nursery.start_soon(read)
            written = await sink.add_blob(self._media_type, pieces)
        before, after = self._reader.finish(), self._checker.finish()
        self._check(before, after, diff_id)
        return _Layer(written, after, self._entries)

    def _feed(self, data: bytes) -> bytes:
        self._reader.feed(data)
        out = b"".join([self._writer.feed(raw) for raw in self._raw])
        self._raw.clear()
        self._entries += self._checker.feed(out)
        return out

    def _finish(self) -> bytes:
        out = self._writer.finish()
        self._entries += self._checker.feed(out)
        return out

    def _check(self, before: LayerScan, after: LayerScan, diff_id: str) -> None:
        if f"sha256:{before.table.digest.hex()}" != self._layer.digest:
            raise IntegrityError("it came with other bytes")
        if f"sha256:{before.table.diff_id.hex()}" != diff_id:
            raise IntegrityError(f"it does not unpack to {diff_id}")
        if after.table.diff_id != before.table.diff_id:
            raise IntegrityError("it was not converted faithfully")
