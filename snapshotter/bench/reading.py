"""Reading a mounted image that is fully local, in each mode, against what is used without it.

That is overlayfs, with the same tree unpacked beside it as its lower directory.
"""

from __future__ import annotations

import shutil
import subprocess
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from snapshotter.bench import fio
from snapshotter.bench.errors import BenchError
from snapshotter.bench.node import running_node
from snapshotter.bench.tables import Cell, Table
from snapshotter.bench.timing import Timing, drop_caches, interleaved, median
from snapshotter.bench.workloads import list_files, workloads
from snapshotter.mounts import syscalls

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from snapshotter.bench.images import StoredImage
    from snapshotter.bench.node import Node
    from snapshotter.bench.workloads import Workload
    from snapshotter.demo.workspace import Workspace

LATER = "erofs-later"
"""Mode `erofs` as an image gets it that finds most of its layers on the node: they are read from
the disk."""

MODES = ("fuse", "erofs", LATER, "native")

_OVERLAY = "overlayfs"
_WARM_RUNS = 5


def compare(image: StoredImage, workspace: Workspace, samples: int) -> list[Table]:
    """Mount and unpack the image, and do the same to all. Needs root.

    A table for each mode; all are of the same run. One more of fio, if that is installed. Mode
    `erofs` is mounted before anything is local, as it is for what started first on a node.
    """
    directory = workspace.directory("local")
    unpacked = directory / "unpacked"
    unpack(image, unpacked)
    files = list_files(unpacked)
    rows: dict[str, list[tuple[Cell, ...]]] = {mode: [] for mode in MODES}
    with (
        running_node(workspace, "node-local") as node,
        running_node(workspace, "node-later") as later,
        _overlay(unpacked, directory) as overlay,
    ):
        roots = {_OVERLAY: overlay} | {mode: directory / mode for mode in MODES}
        for mode in MODES:
            roots[mode].mkdir()
        for mode in ("erofs", "fuse", "native"):
            node.show(image.reference, roots[mode], wait_local=True, mode=mode)
        found = _show_later(later, image, roots[LATER])
        for workload in workloads(files):
            for cache, run in (("dropped", _cold), ("warm", _warm)):
                timings = interleaved(
                    samples, {name: partial(run, workload, root) for name, root in roots.items()}
                )
                what = (workload.name, workload.jobs, cache, workload.unit)
                for mode in MODES:
                    rates = _rates(workload, timings[_OVERLAY], timings[mode])
                    rows[mode].append((*what, *rates))
        resident, private = node.memory()
        largest = max(files.regular, key=lambda file: file[1])[0]
        with_fio = (
            [fio.compare(workspace, roots, largest, _OVERLAY, samples)] if fio.installed() else []
        )
    note = (
        f"{files.names} names, {files.size / 1e6:.0f} MB. Medians of {samples} rounds, and their "
        "ratio: above 1 FirstByte is faster. Lowest and highest: that of single rounds. A warm "
        f"round is the fastest of {_WARM_RUNS} runs after one that filled the page cache. At the "
        f"end {resident:.0f} MB of the daemon were in memory, {private:.0f} of them its own. When "
        f"{LATER} was mounted: {found}."
    )
    columns = ("work", "jobs", "page cache", "unit", _OVERLAY, "FirstByte", "ratio")
    tables = [
        Table(
            f"Reading a fully local image in mode {mode}",
            (*columns, "lowest", "highest"),
            tuple(rows[mode]),
            note,
        )
        for mode in MODES
    ]
    return tables + with_fio


def _show_later(node: Node, image: StoredImage, target: Path) -> str:
    """Mount an image whose start is known, and of which all but the smallest layer is on the node,
    and have that come then. Returns how the image is shown."""
    node.show(image.reference, target, wait_local=True, mode="fuse")
    largest = max(list_files(target).regular, key=lambda file: file[1])[0]
    (target / largest).read_bytes()  # what is touched first is the profile
    node.hide(target)
    node.stop()
    layers = (node.places.root / "layers").iterdir()
    shutil.rmtree(min(layers, key=lambda layer: (layer / "raw").stat().st_size))
    node.restart()
    with _out_of_reach(image.blobs):
        node.show(image.reference, target, wait_local=False)
    other = target.with_name("local")
    other.mkdir()
    node.show(image.reference, other, wait_local=True, mode="fuse")
    node.hide(other)
    (mount,) = node.status().mounts
    return f"{mount.mode}, {mount.why}"


@contextmanager
def _out_of_reach(files: Sequence[Path]) -> Iterator[None]:
    for file in files:
        file.rename(file.with_suffix(".away"))
    try:
        yield
    finally:
        for file in files:
            file.with_suffix(".away").rename(file)


def unpack(image: StoredImage, target: Path) -> None:
    """Unpack all layers into a new directory, with tar. Raises BenchError."""
    target.mkdir()
    for blob in image.blobs:
        command = ["tar", "--extract", "--numeric-owner", "--file", str(blob)]
        done = subprocess.run(
            [*command, "--directory", str(target)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise BenchError(f"tar cannot unpack {blob}", hint=done.stderr[-500:])


@contextmanager
def _overlay(lower: Path, directory: Path) -> Iterator[Path]:
    """Mount a container's root, as it is without FirstByte: `lower`, and a writable layer."""
    upper, work, target = directory / "upper", directory / "work", directory / "overlay"
    for made in (upper, work, target):
        made.mkdir()
    options = f"lowerdir={lower},upperdir={upper},workdir={work}"
    syscalls.mount("overlay", target, "overlay", syscalls.MountFlag(0), options)
    try:
        yield target
    finally:
        syscalls.unmount(target)


def _cold(workload: Workload[object], root: Path) -> Timing:
    return workload.run(root, drop_caches)


def _warm(workload: Workload[object], root: Path) -> Timing:
    """The fastest of a few runs: these are short, and an interruption would be most of one."""
    workload.run(root, _nothing)
    runs = [workload.run(root, _nothing) for _ in range(_WARM_RUNS)]
    return min(runs, key=lambda timing: timing.seconds)


def _nothing() -> None:
    pass


def _rates(
    workload: Workload[object], overlay: Sequence[Timing], mounted: Sequence[Timing]
) -> tuple[float, ...]:
    """Both rates, their ratio, and the lowest and highest ratio of a round."""
    ours, theirs = median(mounted).seconds, median(overlay).seconds
    ratios = [a.seconds / b.seconds for a, b in zip(overlay, mounted, strict=True)]
    return (
        workload.amount / theirs,
        workload.amount / ours,
        theirs / ours,
        min(ratios),
        max(ratios),
    )
