"""A file index in a registry: an OCI artifact whose subject is the image's manifest.

docs/file-index-format.md, "In a registry", shows one.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

from index.errors import FirstByteError, IntegrityError
from snapshotter.registry.digests import digest_of
from snapshotter.registry.image import body_of
from snapshotter.registry.manifest import EMPTY_DESCRIPTOR, EMPTY_JSON, Descriptor, Manifest

if TYPE_CHECKING:
    from index.file import FileIndex
    from snapshotter.registry.image import ImageSink, ResolvedImage

ARTIFACT_TYPE = "application/vnd.firstbyte.index.v1"
"""Type of the artifact, and media type of the blob in it."""

PACK_TYPE = "application/vnd.firstbyte.pack.v1"
"""Media type of the startup pack, the second blob of an artifact that has one."""

PACKED_ANNOTATION = "io.firstbyte.pack.created"
"""On an artifact with a startup pack: when it was made (RFC 3339, UTC). Of several the newest is
used, which the list of referrers tells without a further request."""

DIGEST_ANNOTATION = "io.firstbyte.index.digest"
"""On the artifact: the index digest, which does not depend on compression."""

BLOBS_ANNOTATION = "io.firstbyte.index.blobs"
"""On the artifact: `<digest>,<size>` of its index and, after a space, of its startup pack if it has
one. The list of referrers has it, too, so that the artifact itself need not be fetched."""

LAYER_ANNOTATION = "containerd.io/snapshot/firstbyte.index"
"""On every layer of a converted image: `<digest>,<size>` of the index's blob. containerd hands
annotations with this prefix to a snapshotter, which saves it the search."""


async def publish(
    sink: ImageSink,
    subject: Descriptor,
    packed: bytes,
    index_digest: bytes,
    *,
    pack: bytes | None = None,
) -> Descriptor:
    """Push an index, in the form that travels, so that whoever has the image `subject` finds it.

    `pack` is a startup pack of that index, to go with it. Returns the descriptor of the artifact's
    manifest.
    """
    blobs = [(blob_descriptor(packed), packed)]
    annotations = {DIGEST_ANNOTATION: f"sha256:{index_digest.hex()}"}
    if pack is not None:
        digest = Descriptor(media_type=PACK_TYPE, digest=digest_of(pack), size=len(pack))
        blobs.append((digest, pack))
        annotations[PACKED_ANNOTATION] = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%S.%fZ}"
    annotations[BLOBS_ANNOTATION] = " ".join(f"{blob.digest},{blob.size}" for blob, _ in blobs)
    await sink.write_blob(EMPTY_DESCRIPTOR, body_of(EMPTY_JSON))
    for blob, data in blobs:
        await sink.write_blob(blob, body_of(data))
    manifest = Manifest.build(
        config=EMPTY_DESCRIPTOR,
        layers=[blob for blob, _ in blobs],
        subject=Descriptor(media_type=subject.media_type, digest=subject.digest, size=subject.size),
        artifact_type=ARTIFACT_TYPE,
        annotations=annotations,
    )
    return await sink.write_manifest(manifest, named=False)


def blobs_of(artifact: Manifest) -> tuple[Descriptor, Descriptor | None]:
    """The index and the startup pack that an artifact has. Raises IntegrityError for any other."""
    types = [blob.media_type for blob in artifact.layers]
    if types not in ([ARTIFACT_TYPE], [ARTIFACT_TYPE, PACK_TYPE]):
        raise IntegrityError("the artifact is not a file index, and perhaps a startup pack")
    return artifact.layers[0], artifact.layers[1] if len(types) > 1 else None


def listed_blobs(artifact: Descriptor) -> tuple[Descriptor, Descriptor | None] | None:
    """As `blobs_of`, from the list of referrers alone; None if that does not tell."""
    names = (artifact.annotation(BLOBS_ANNOTATION) or "").split(" ")
    if len(names) > 2 or not names[0]:
        return None
    try:
        index = named_blob(names[0], ARTIFACT_TYPE)
        return index, named_blob(names[1], PACK_TYPE) if len(names) > 1 else None
    except (FirstByteError, ValueError):
        return None


def named_blob(text: str, media_type: str) -> Descriptor:
    """From `<digest>,<size>`, as annotations have it. Raises ValueError or a FirstByteError."""
    digest, _, size = text.partition(",")
    return Descriptor(media_type=media_type, digest=digest, size=int(size))


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
