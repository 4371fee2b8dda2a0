"""Mounting a large image whose file index is on the node already."""

from __future__ import annotations

import socket
import statistics
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

import msgspec
import trio

from snapshotter.bench.images import ZSTD_FRAMES
from snapshotter.bench.node import running_node
from snapshotter.bench.synthetic import make_index
from snapshotter.bench.tables import Cell, Table
from snapshotter.bench.timing import drop_caches
from snapshotter.registry.digests import digest_of
from snapshotter.registry.image import body_of
from snapshotter.registry.layout import Layout
from snapshotter.registry.manifest import OCI_CONFIG, Descriptor, Manifest
from snapshotter.registry.platform import Platform
from snapshotter.registry.reference import LAYOUT_PREFIX

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from index.file import FileIndex
    from snapshotter.bench.node import Node
    from snapshotter.demo.workspace import Workspace

_MODES = ("fuse", "erofs")  # native needs the data, and there is none


def mounting(count: int, workspace: Workspace, samples: int) -> Table:
    """Mount a made-up image of so many files, of which nothing but the index is on the node.

    Needs root.
    """
    directory = workspace.directory("large")
    target = workspace.directory("large", "mounted")
    rows: list[tuple[Cell, ...]] = []
    with silent_registry() as host, running_node(workspace, "node-large") as node:
        before = node.memory()
        reference = take_in(node, count, directory / "image", target, host)
        for mode in _MODES:
            for cache, prepare in (("dropped", drop_caches), ("warm", _nothing)):
                times = []
                for _ in range(samples):
                    prepare()
                    times.append(_mount(node, reference, target, mode))
                    memory = node.memory()
                    node.hide(target)
                rows.append((mode, cache, statistics.median(times), max(times), *memory))
    return Table(
        f"Mounting an image of {count} files whose index is on the node",
        ("mode", "page cache", "ms", "slowest ms", "resident MB", "private MB"),
        tuple(rows),
        f"Medians of {samples} mounts, from the request to the reply. Resident is what the daemon "
        "has in memory after the last one, private what of it is no mapped file; before the first "
        f"it was {before.resident:.0f} and {before.private:.0f} MB.",
    )


def take_in(node: Node, count: int, directory: Path, target: Path, host: str) -> str:
    """Have a node know a made-up image of so many files, whose data nobody has.

    Everything is made in a new `directory`; `target` is for mounting, for the moment, by which the
    node also tries what the kernel can do. Returns the image's reference in a registry at `host`.
    """
    directory.mkdir()
    layout, packed = directory / "layout", directory / "index"
    index = make_index(count)
    packed.write_bytes(index.packed())
    digest = trio.run(_write_image, Layout(layout), index)
    node.show(f"{LAYOUT_PREFIX}{layout}", target, wait_local=False, mode="erofs", index=packed)
    node.hide(target)
    return f"{host}/bench@{digest}"


@contextmanager
def silent_registry() -> Iterator[str]:
    """The HOST:PORT of a registry that never answers: what is wanted of it stays on its way."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"127.0.0.1:{listener.getsockname()[1]}"


def _mount(node: Node, reference: str, target: Path, mode: str) -> float:
    """Milliseconds."""
    began = time.perf_counter()
    node.show(reference, target, wait_local=False, mode=mode)
    return 1e3 * (time.perf_counter() - began)


async def _write_image(layout: Layout, index: FileIndex) -> str:
    """An image that the index belongs to, its digest; its layers are missing."""
    config = msgspec.json.encode(
        {
            "architecture": Platform.host().architecture,
            "os": Platform.host().os,
            "config": {},
            "rootfs": {
                "type": "layers",
                "diff_ids": [f"sha256:{table.diff_id.hex()}" for table in index.layers],
            },
        }
    )
    descriptor = Descriptor(media_type=OCI_CONFIG, digest=digest_of(config), size=len(config))
    await layout.write_blob(descriptor, body_of(config))
    layers = [
        Descriptor(
            media_type=ZSTD_FRAMES.media_type,
            digest=f"sha256:{table.digest.hex()}",
            size=table.blob_size,
        )
        for table in index.layers
    ]
    manifest = Manifest.build(config=descriptor, layers=layers)
    await layout.write_manifest(manifest, named=True)
    return manifest.descriptor.digest


def _nothing() -> None:
    pass
