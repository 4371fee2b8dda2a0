"""OCI layouts of layers that a test has made."""

from __future__ import annotations

import gzip
import hashlib
import json
from typing import TYPE_CHECKING, Literal

from index.convert import FrameWriter
from index.tables import Codec

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

_LAYER_TYPES = {
    "gzip": "application/vnd.oci.image.layer.v1.tar+gzip",
    "none": "application/vnd.oci.image.layer.v1.tar",
}


def write_layout(
    path: Path,
    layers: Sequence[bytes],
    *,
    compress: Literal["gzip", "none"] = "gzip",
    tag: str = "latest",
    config: Mapping[str, object] | None = None,
) -> str:
    """Write an image of uncompressed `layers`, the lowest first; returns its manifest's digest.

    Equal arguments give equal bytes. `config` adds to, or replaces, keys of the image's
    configuration. A layout that exists already keeps its other images.
    """
    packed = [
        (gzip.compress(raw, 6, mtime=0) if compress == "gzip" else raw, raw_digest([raw]))
        for raw in layers
    ]
    return write_packed(path, packed, _LAYER_TYPES[compress], tag=tag, config=config)


def seekable(raw: Iterable[bytes]) -> bytes:
    """A layer that is too large for memory, in zstd frames."""
    writer = FrameWriter(Codec.ZSTD, level=1, threads=2)
    return b"".join([*map(writer.feed, raw), writer.finish()])


def raw_digest(raw: Iterable[bytes]) -> str:
    """A diffID."""
    hasher = hashlib.sha256()
    for piece in raw:
        hasher.update(piece)
    return f"sha256:{hasher.hexdigest()}"


def write_packed(
    path: Path,
    layers: Sequence[tuple[bytes, str]],
    media_type: str,
    *,
    tag: str = "latest",
    config: Mapping[str, object] | None = None,
) -> str:
    """As `write_layout`, of blobs with their diffIDs."""
    blobs = path / "blobs" / "sha256"
    blobs.mkdir(parents=True, exist_ok=True)

    def add(data: bytes, media_type: str) -> dict[str, object]:
        digest = hashlib.sha256(data).hexdigest()
        (blobs / digest).write_bytes(data)
        return {"mediaType": media_type, "digest": f"sha256:{digest}", "size": len(data)}

    def add_json(value: object, media_type: str) -> dict[str, object]:
        return add(json.dumps(value, sort_keys=True).encode(), media_type)

    configuration = {
        "architecture": "amd64",
        "os": "linux",
        "config": {},
        "rootfs": {"type": "layers", "diff_ids": [diff_id for _, diff_id in layers]},
        **(config or {}),
    }
    manifest = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": add_json(configuration, "application/vnd.oci.image.config.v1+json"),
        "layers": [add(data, media_type) for data, _ in layers],
    }
    descriptor = add_json(manifest, "application/vnd.oci.image.manifest.v1+json")
    digest = str(descriptor["digest"])
    descriptor["annotations"] = {"org.opencontainers.image.ref.name": tag}

    index = path / "index.json"
    images = json.loads(index.read_bytes())["manifests"] if index.exists() else []
    images = [image for image in images if image.get("annotations") != descriptor["annotations"]]
    index.write_text(json.dumps({"schemaVersion": 2, "manifests": [*images, descriptor]}))
    (path / "oci-layout").write_text(json.dumps({"imageLayoutVersion": "1.0.0"}))
    return digest
