"""What is known of the start of an open image, as it is told to clients."""

from __future__ import annotations

from typing import TYPE_CHECKING

from snapshotter.daemon import protocol
from snapshotter.fetch.trace import WINDOW

if TYPE_CHECKING:
    from snapshotter.daemon.open_image import OpenImage

_SHORTEST = 6  # digits of a digest that are enough to name an image


def is_named(image: OpenImage, name: str) -> bool:
    """Whether a person who writes `name` may mean this image."""
    digits = name.removeprefix("sha256:")
    for digest, resolved in image.manifests.items():
        if name == digest or _short(resolved.name) in (
            _short(name),
            _short(name).rpartition(":")[0],
        ):
            return True
        if len(digits) >= _SHORTEST and digest.removeprefix("sha256:").startswith(digits):
            return True
    return False


def _short(reference: str) -> str:
    """A reference as people write it. containerd's images have the digest, and no tag any more."""
    return reference.split("@")[0].removeprefix("docker.io/").removeprefix("library/")


def start_record(image: OpenImage) -> protocol.StartRecord:
    """Everything that was recorded since an image was opened."""
    trace = image.trace
    tables = [layer.table for layer in image.layers]
    read = {(touch.layer, touch.chunk) for touch in trace.touches}
    return protocol.StartRecord(
        reference=image.resolved.name,
        digest=image.digest,
        index=image.found.index.digest.hex(),
        layers=[f"sha256:{table.digest.hex()}" for table in tables],
        began_ns=trace.began_ns,
        seconds=trace.age,
        window=WINDOW,
        steps=[protocol.TracedStep(step.name, step.at, step.seconds) for step in trace.steps],
        stalls=[
            protocol.TracedStall(one.layer, one.offset, one.length, one.at, one.seconds)
            for one in trace.stalls
        ],
        exchanges=[
            protocol.TracedExchange(
                one.layer, one.kind.name.lower(), one.at, one.answered, one.ended, one.size
            )
            for one in trace.exchanges
        ],
        chunks=[
            protocol.TracedChunk(
                layer,
                chunk,
                tables[layer].chunk_length(chunk),
                "" if cause is None else cause.name.lower(),
                (layer, chunk) in read,
            )
            for (layer, chunk), cause in trace.arrived.items()
        ],
        first_reads=len(read),
    )
