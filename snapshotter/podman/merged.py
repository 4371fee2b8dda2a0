"""An image as podman has to see it when all its layers are one.

containers/storage wants as many layers as manifest, configuration and history speak of; so these
are written anew, with one. What else the image says stays. Its ID is another than that of the
ordinary image, which can therefore be pulled beside it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import msgspec

from snapshotter.registry.digests import digest_of
from snapshotter.registry.manifest import OCI_CONFIG, OCI_LAYER, Descriptor, Manifest

_LONG_AGO = "0001-01-01T00:00:00Z"  # how Go spells a time that nobody has set
_CREATED_BY = "FirstByte: all layers, merged"

_encoder = msgspec.json.Encoder()


@dataclass(frozen=True)
class MergedImage:
    """`id` is the hexadecimal digest of the configuration, `layer` the layer's ID, `data` what
    containers/storage keeps with an image, by its own keys. `created` is as Go reads times."""

    id: str
    layer: str
    manifest_digest: str
    created: str
    data: dict[str, bytes]


def merged_image(manifest: bytes, config: bytes, size: int) -> MergedImage:
    """From the bytes of an image's manifest and configuration; `size` is its layers' together.

    The layer's digest is not that of a tar, which nobody could tell before all of the image is
    here, but a name in the form of one: podman wants one. It can be run and built upon, and not
    pushed: podman finds that what it reads has another digest, and says so.
    """
    original = digest_of(manifest)
    layer = hashlib.sha256(f"FirstByte: all layers of {original}".encode()).hexdigest()
    fields: dict[str, Any] = msgspec.json.decode(config)
    fields["rootfs"] = {"type": "layers", "diff_ids": [f"sha256:{layer}"]}
    fields["history"] = _history(fields.get("history"))
    written = _encoder.encode(fields)
    made = Manifest.build(
        config=Descriptor(media_type=OCI_CONFIG, digest=digest_of(written), size=len(written)),
        layers=[Descriptor(media_type=OCI_LAYER, digest=f"sha256:{layer}", size=size)],
    )
    digest = digest_of(made.raw)
    return MergedImage(
        id=digest_of(written).removeprefix("sha256:"),
        layer=layer,
        manifest_digest=digest,
        created=_created(fields.get("created")),
        data={
            "manifest": made.raw,
            f"manifest-{digest}": made.raw,
            digest_of(written): written,
            # For those who name the image by its digest in the registry.
            f"manifest-{original}": manifest,
            digest_of(config): config,
        },
    )


def layered_image(manifest: bytes, config: bytes, layer: str) -> MergedImage:
    """The image as it is, with its topmost layer's ID."""
    fields: dict[str, Any] = msgspec.json.decode(config)
    digest = digest_of(manifest)
    return MergedImage(
        id=digest_of(config).removeprefix("sha256:"),
        layer=layer,
        manifest_digest=digest,
        created=_created(fields.get("created")),
        data={"manifest": manifest, f"manifest-{digest}": manifest, digest_of(config): config},
    )


def go_time(moment: datetime) -> str:
    """A moment in the one form that Go reads (RFC 3339)."""
    return moment.astimezone(UTC).isoformat().replace("+00:00", "Z")


def _history(entries: object) -> list[dict[str, Any]]:
    """The same history, in which only the last entry that made a layer has made one."""
    kept = [dict(one) for one in entries] if isinstance(entries, list) else []
    last = True
    for entry in reversed(kept):
        if not entry.get("empty_layer"):
            if not last:
                entry["empty_layer"] = True
            last = False
    return [*kept, {"created_by": _CREATED_BY}] if last else kept


def _created(text: object) -> str:
    """A time that Go cannot read would keep podman from reading any image of the store."""
    try:
        moment = datetime.fromisoformat(text) if isinstance(text, str) else None
    except ValueError:
        moment = None
    return go_time(moment) if moment and moment.tzinfo else _LONG_AGO
