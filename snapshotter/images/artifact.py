"""A file index in a registry: an OCI artifact whose subject is the image's manifest.

docs/file-index-format.md, "In a registry", shows one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from index.errors import IntegrityError
from snapshotter.registry.digests import digest_of
from snapshotter.registry.image import body_of
from snapshotter.registry.manifest import EMPTY_DESCRIPTOR, EMPTY_JSON, Descriptor, Manifest

if TYPE_CHECKING:
    from index.file import FileIndex
    from snapshotter.registry.image import ImageSink, ResolvedImage

ARTIFACT_TYPE = "application/vnd.firstbyte.index.v1"
"""Type of the artifact, and media type of the blob in it."""

DIGEST_ANNOTATION = "io.firstbyte.index.digest"
"""On the artifact: the index digest, which does not depend on compression."""

LAYER_ANNOTATION = "containerd.io/snapshot/firstbyte.index"
"""On every layer of a converted image: `<digest>,<size>` of the index's blob. containerd hands
annotations with this prefix to a snapshotter, which saves it the search."""


async def publish(
    sink: ImageSink, subject: Descriptor, packed: bytes, index_digest: bytes
) -> Descriptor:
    """Push an index, in the form that travels, so that whoever has the image `subject` finds it.

    Returns the descriptor of the artifact's manifest.
    """
    blob = blob_descriptor(packed)
    await sink.write_blob(EMPTY_DESCRIPTOR, body_of(EMPTY_JSON))
    await sink.write_blob(blob, body_of(packed))
    manifest = Manifest.build(
        config=EMPTY_DESCRIPTOR,
        layers=[blob],
        subject=Descriptor(media_type=subject.media_type, digest=subject.digest, size=subject.size),
        artifact_type=ARTIFACT_TYPE,
        annotations={DIGEST_ANNOTATION: f"sha256:{index_digest.hex()}"},
    )
    return await sink.write_manifest(manifest, named=False)


def blob_descriptor(packed: bytes) -> Descriptor:
    """What names an index in the form that travels."""
    return Descriptor(media_type=ARTIFACT_TYPE, digest=digest_of(packed), size=len(packed))


def check_belongs(index: FileIndex, image: ResolvedImage) -> None:
    """Raise IntegrityError unless the index is of exactly these layers, in this order."""
    promised = [
        (layer.digest, layer.size, diff_id)
        for layer, diff_id in zip(image.manifest.layers, image.config.rootfs.diff_ids, strict=True)
    ]
    indexed = [
        (f"sha256:{table.digest.hex()}", table.blob_size, f"sha256:{table.diff_id.hex()}")
        for table in index.layers
    ]
    if promised != indexed:
        raise IntegrityError(f"the file index is not of the layers of {image.name}")
