"""Reading a lazily mounted tree that is fully local, against the same tree unpacked beside it."""

from __future__ import annotations

import subprocess
from functools import partial
from typing import TYPE_CHECKING

from snapshotter.bench.errors import BenchError
from snapshotter.bench.node import running_node
from snapshotter.bench.tables import Cell, Table
from snapshotter.bench.timing import Timing, drop_caches, interleaved, median
from snapshotter.bench.workloads import list_files, workloads

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from snapshotter.bench.images import StoredImage
    from snapshotter.bench.workloads import Workload

_WARM_RUNS = 5


def compare(image: StoredImage, directory: Path, samples: int) -> Table:
    """Mount and unpack the image in a new `directory`, and do the same to both. Needs root."""
    directory.mkdir()
    unpacked, mounted = directory / "unpacked", directory / "mounted"
    unpack(image, unpacked)
    mounted.mkdir()
    files = list_files(unpacked)
    rows: list[tuple[Cell, ...]] = []
    with running_node(directory / "node") as node:
        status = node.mount(image.reference, mounted, wait_local=True)
        for workload in workloads(files):
            for cache, run in (("dropped", _cold), ("warm", _warm)):
                timings = interleaved(
                    samples,
                    {root: partial(run, workload, root) for root in (unpacked, mounted)},
                )
                rows.append(
                    (
                        workload.name,
                        cache,
                        workload.unit,
                        *_rates(workload, timings[unpacked], timings[mounted]),
                    )
                )
    return Table(
        f"Reading a fully local image through FirstByte (mode {status.mode})",
        ("work", "page cache", "unit", "unpacked", "FirstByte", "ratio", "lowest", "highest"),
        tuple(rows),
        f"{files.names} names, {files.size / 1e6:.0f} MB. Medians of {samples} rounds, and their "
        "ratio: above 1 FirstByte is faster. Lowest and highest: that of single rounds. A warm "
        f"round is the fastest of {_WARM_RUNS} runs after one that filled the page cache.",
    )


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


def _cold(workload: Workload, root: Path) -> Timing:
    return workload.run(root, drop_caches)


def _warm(workload: Workload, root: Path) -> Timing:
    """The fastest of a few runs: these are short, and an interruption would be most of one."""
    workload.run(root, _nothing)
    runs = [workload.run(root, _nothing) for _ in range(_WARM_RUNS)]
    return min(runs, key=lambda timing: timing.seconds)


def _nothing() -> None:
    pass


def _rates(
    workload: Workload, unpacked: Sequence[Timing], mounted: Sequence[Timing]
) -> tuple[float, ...]:
    """Both rates, their ratio, and the lowest and highest ratio of a round."""
    ours, theirs = median(mounted).seconds, median(unpacked).seconds
    ratios = [a.seconds / b.seconds for a, b in zip(unpacked, mounted, strict=True)]
    return (
        workload.amount / theirs,
        workload.amount / ours,
        theirs / ours,
        min(ratios),
        max(ratios),
    )
