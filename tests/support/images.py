"""Small images, made up for tests, and ways to put them somewhere."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import random
import tarfile
from dataclasses import dataclass
from typing import TYPE_CHECKING

from snapshotter.registry.image import body_of
from snapshotter.registry.manifest import OCI_CONFIG, OCI_LAYER, Descriptor, Manifest

if TYPE_CHECKING:
    from snapshotter.registry.client import Registry
    from snapshotter.registry.image import ImageSink
    from tests.support.faults import FaultRegistry


@dataclass(frozen=True)
class SampleImage:
    """An image with all its bytes. `layers` are gzip, lowest first."""

    config: bytes
    layers: tuple[bytes, ...]
    manifest: Manifest

    @property
    def blobs(self) -> dict[str, bytes]:
        """Configuration and layers by digest."""
        return {digest(data): data for data in (self.config, *self.layers)}


def digest(data: bytes) -> str:
    """The sha256 digest, computed independently of what is tested."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def sample_image(
    *, seed: int = 0, layers: int = 2, size: int = 100_000, architecture: str = "amd64"
) -> SampleImage:
    """An image of `layers` layers with one incompressible file of `size` bytes each."""
    made = [_layer(f"file{number}", seed + number, size) for number in range(layers)]
    config = json.dumps(
        {
            "architecture": architecture,
            "os": "linux",
            "config": {"Entrypoint": None, "Cmd": ["/bin/sh"], "Env": ["SEED=" + str(seed)]},
            "rootfs": {"type": "layers", "diff_ids": [digest(tar) for tar, _ in made]},
        }
    ).encode()
    manifest = Manifest.build(
        config=Descriptor(media_type=OCI_CONFIG, digest=digest(config), size=len(config)),
        layers=[
            Descriptor(media_type=f"{OCI_LAYER}+gzip", digest=digest(blob), size=len(blob))
            for _, blob in made
        ],
    )
    return SampleImage(config, tuple(blob for _, blob in made), manifest)


def _layer(name: str, seed: int, size: int) -> tuple[bytes, bytes]:
    output = io.BytesIO()
    with tarfile.open(fileobj=output, mode="w") as tar:
        entry = tarfile.TarInfo(name)
        entry.size = size
        tar.addfile(entry, io.BytesIO(random.Random(seed).randbytes(size)))
    return output.getvalue(), gzip.compress(output.getvalue(), mtime=0)


def put(registry: FaultRegistry, repository: str, image: SampleImage, *tags: str) -> None:
    """Put an image into a fault-injecting registry, from behind."""
    for data in image.blobs.values():
        registry.add_blob(data)
    registry.add_manifest(repository, image.manifest.raw, *tags)


async def push(sink: ImageSink, image: SampleImage, *, named: bool = True) -> None:
    """Push an image as FirstByte does."""
    for descriptor in (image.manifest.config, *image.manifest.layers):
        await sink.write_blob(descriptor, body_of(image.blobs[descriptor.digest]))
    await sink.write_manifest(image.manifest, named=named)


async def read(source: Registry, layer: Descriptor, start: int, end: int) -> bytes:
    """Bytes `start` … `end` of a layer."""
    async with source.open_range(layer, start, end) as pieces:
        return b"".join([piece async for piece in pieces])
