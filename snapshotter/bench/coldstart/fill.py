"""How fast an image arrives when nobody waits for any of it."""

from __future__ import annotations

import hashlib
import os
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from isal import isal_zlib

from index.tables import CHUNK_SIZE
from snapshotter.bench.images import read_pieces
from snapshotter.bench.tables import Cell, Table
from snapshotter.bench.timing import drop_caches, interleaved

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from snapshotter.bench.coldstart.catalogue import Image
    from snapshotter.bench.coldstart.modes import Mode
    from snapshotter.bench.coldstart.session import Session

_WITH_GZIP_HEADER = 31  # window bits of zlib.h


class _Filled(NamedTuple):
    seconds: float
    bytes: int
    cpu_seconds: float


def fill(session: Session, images: Sequence[Image], modes: Sequence[Mode], samples: int) -> Table:
    """Pull each image and wait until it is all there. Raises BenchError or DemoError."""
    link = session.place.registry.link

    def work(image: Image, mode: Mode) -> _Filled:
        start = session.start(image, mode)
        with session.node(mode) as node:
            drop_caches()
            session.place.registry.read_into_memory(start.repository)
            before, began = link.carried(), time.perf_counter()
            node.pull(f"{session.place.registry.host}/{start.repository}:latest")
            session.wait_local(node)
            seconds = time.perf_counter() - began
            filled = _Filled(
                seconds, link.carried().since(before).down, node.usage().cpu_seconds or 0.0
            )
        session.say(f"{image.name}, {mode.name}: {filled.bytes / 1e6 / seconds:.1f} MB/s")
        return filled

    works: dict[tuple[str, str], Callable[[], _Filled]] = {}
    for image in images:
        for mode in modes:
            session.publisher.repository(image, mode.variant)
            works[image.name, mode.name] = partial(work, image, mode)
    bandwidth = link.profile.bandwidth / 8
    bounds = {image.name: _bound(session.publisher.layers(image)) for image in images}
    rows: list[tuple[Cell, ...]] = []
    kept: list[Mapping[str, object]] = []
    for (name, mode_name), found in interleaved(samples, works).items():
        rate = statistics.median(filled.bytes / filled.seconds for filled in found)
        limit = min(bandwidth, bounds[name])
        kept += [{"image": name, "mode": mode_name, **filled._asdict()} for filled in found]
        rows.append(
            (
                name,
                mode_name,
                statistics.median(filled.bytes for filled in found) / 1e6,
                statistics.median(filled.seconds for filled in found),
                rate / 1e6,
                bandwidth / 1e6,
                bounds[name] / 1e6,
                rate / limit,
                statistics.median(filled.cpu_seconds for filled in found),
            )
        )
    return Table(
        f"Background fill, {link.profile.name}",
        (
            "image",
            "mode",
            "MB",
            "seconds",
            "MB/s",
            "link MB/s",
            "cores MB/s",
            "of the lesser",
            "daemon CPU s",
        ),
        tuple(rows),
        f"Compressed bytes, from the pull until all is there and proven; medians of {samples} "
        "rounds. `cores` is what all of this machine's can inflate and digest twice (chunks, and "
        "the whole), with nothing else to do. Target: 0.9 of the lesser.",
        tuple(kept),
    )


def _bound(layers: Sequence[Path]) -> float:
    """Compressed bytes a second that all cores can inflate and hash, a layer at a time each."""
    pieces = [path for path in layers for _ in range(os.cpu_count() or 1)]
    size = sum(path.stat().st_size for path in pieces)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        began = time.perf_counter()
        list(pool.map(_digest, pieces))
        return size / (time.perf_counter() - began)


def _digest(path: Path) -> None:
    inflater, whole = isal_zlib.decompressobj(_WITH_GZIP_HEADER), hashlib.sha256()
    for piece in read_pieces(path):
        while piece:
            raw = inflater.decompress(piece, CHUNK_SIZE)
            hashlib.sha256(raw).digest()
            whole.update(raw)
            piece = inflater.unconsumed_tail
