"""The first reading of a whole image of which nothing is on the node yet."""

from __future__ import annotations

import shutil
import statistics
import time
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import trio

from snapshotter.bench.building import build
from snapshotter.bench.images import copy_image
from snapshotter.bench.node import running_node
from snapshotter.bench.reading import unpack
from snapshotter.bench.tables import Table
from snapshotter.bench.timing import drop_caches, interleaved
from snapshotter.bench.workloads import list_files, read_everything
from snapshotter.demo.registry import LocalRegistry
from snapshotter.images import artifact
from snapshotter.registry.credentials import CredentialStore
from snapshotter.registry.locations import Locations
from snapshotter.registry.platform import Platform
from snapshotter.registry.reference import LAYOUT_PREFIX
from snapshotter.registry.transport import Transport

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from index.file import FileIndex
    from snapshotter.bench.images import StoredImage
    from snapshotter.bench.workloads import Files
    from snapshotter.demo.workspace import Workspace

_PAGE = 4 << 10  # bytes of the very first read


class _Start(NamedTuple):
    """Seconds since the start when the tree was there, when a first page was, when all was."""

    tree: float
    first_page: float
    everything: float


def first_read(image: StoredImage, workspace: Workspace, samples: int) -> Table:
    """Mount an image and read all of it at once, from several places. Needs root.

    Compared with unpacking it first, which is what happens when nothing is lazy.
    """
    directory = workspace.directory("first")
    unpacked = directory / "unpacked"
    unpack(image, unpacked)
    files = list_files(unpacked)
    shutil.rmtree(unpacked)
    host = LocalRegistry(workspace).host
    indexed, registry = f"{LAYOUT_PREFIX}{directory / 'indexed'}", f"{host}/bench:latest"
    trio.run(_publish, image, build(image), (indexed, registry))
    starts: dict[str, Callable[[], _Start]] = {
        "unpack with tar, then read": partial(_unpack_and_read, image, unpacked, files)
    }
    for name, reference in (
        ("OCI layout on disk", indexed),
        ("OCI layout on disk, without an index", image.reference),
        ("registry on loopback", registry),
    ):
        mount = partial(_mount_and_read, workspace, reference, files)
        starts[f"mount lazily: {name}"] = mount
    measured = interleaved(samples, starts)
    typical = {
        name: _Start(*map(statistics.median, zip(*times, strict=True)))
        for name, times in measured.items()
    }
    whole = next(iter(typical.values())).everything
    return Table(
        "Reading all of an image when nothing of it is local",
        ("start", "tree after s", "first page after s", "all read after s", "MB/s", "ratio"),
        tuple(
            (name, *start, files.size / 1e6 / start.everything, whole / start.everything)
            for name, start in typical.items()
        ),
        f"{len(files.regular)} files, {files.size / 1e6:.0f} MB, {image.size / 1e6:.0f} MB "
        f"compressed ({image.form.name}). Medians of {samples} rounds, page cache dropped before "
        "each, one reader going through the files in order. The ratio is that of the time until "
        "all is read: above 1 is faster than unpacking first.",
    )


def _unpack_and_read(image: StoredImage, target: Path, files: Files) -> _Start:
    drop_caches()
    began = time.perf_counter()
    unpack(image, target)
    start = _read(target, files, began)
    shutil.rmtree(target)
    return start


def _mount_and_read(workspace: Workspace, reference: str, files: Files) -> _Start:
    directory = workspace.directory("node-first")
    target = workspace.directory("node-first", "mounted")
    with running_node(workspace, directory.name) as node:
        drop_caches()
        began = time.perf_counter()
        node.show(reference, target, wait_local=False)
        start = _read(target, files, began)
    shutil.rmtree(directory)
    return start


def _read(root: Path, files: Files, began: float) -> _Start:
    tree = time.perf_counter() - began
    with (root / files.regular[0][0]).open("rb", buffering=0) as file:
        file.read(_PAGE)
    first_page = time.perf_counter() - began
    read_everything(root, files)
    return _Start(tree, first_page, time.perf_counter() - began)


async def _publish(image: StoredImage, index: FileIndex, targets: Sequence[str]) -> None:
    """Copy an image to other places, and its file index with it."""
    packed = index.packed()
    async with Transport() as transport:
        locations = Locations(transport, CredentialStore())
        source = locations.source(image.reference)
        resolved = await source.resolve(Platform.host())
        for target in targets:
            sink = locations.sink(target)
            await copy_image(source, resolved, sink)
            await artifact.publish(sink, resolved.descriptor, packed, index.digest)
