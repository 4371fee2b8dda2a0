"""fio on the largest file of a mounted tree: what storage people ask for.

Source: fio(1), its JSON output.
"""

from __future__ import annotations

import shutil
import statistics
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from snapshotter.bench.tables import Cell, Table
from snapshotter.bench.timing import interleaved

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from snapshotter.demo.workspace import Workspace

_SECONDS = 2.0  # of each run
_LIMIT_SECONDS = 60.0
_PATTERNS = (("read", "128k"), ("randread", "4k"), ("randread", "128k"))
_JOBS = (1, 4)
_P99 = "99.000000"


class _Latency(msgspec.Struct):
    percentile: dict[str, int] = {}


class _Read(msgspec.Struct):
    bw_bytes: int
    iops: float
    clat_ns: _Latency


class _Job(msgspec.Struct):
    read: _Read


class _Output(msgspec.Struct):
    jobs: list[_Job]


class _Result(NamedTuple):
    bytes: float  # a second
    p99: float  # seconds


def installed() -> bool:
    """Whether fio is there."""
    return shutil.which("fio") is not None


def compare(
    workspace: Workspace, roots: Mapping[str, Path], file: str, reference: str, samples: int
) -> Table:
    """Run fio on `file` in each of the trees; ratios are to that of the name `reference`.

    The page cache is warm after the first run: what is measured is the way through the kernel and,
    where it is asked, the daemon. Raises DemoError.
    """
    rows: list[tuple[Cell, ...]] = []
    for pattern, block in _PATTERNS:
        for jobs in _JOBS:
            runs: dict[str, Callable[[], _Result]] = {
                name: partial(_run, workspace, root / file, pattern, block, jobs)
                for name, root in roots.items()
            }
            found = {
                name: _Result(*map(statistics.median, zip(*results, strict=True)))
                for name, results in interleaved(samples, runs).items()
            }
            rows += [
                (
                    f"{pattern} {block}",
                    jobs,
                    name,
                    result.bytes / 1e6,
                    1e6 * result.p99,
                    result.bytes / found[reference].bytes,
                )
                for name, result in found.items()
            ]
    return Table(
        "fio on the largest file of a fully local image",
        ("pattern", "jobs", "mode", "MB/s", "p99 µs", "ratio"),
        tuple(rows),
        f"Medians of {samples} runs of {_SECONDS:g} s with psync, whose page cache was invalidated "
        f"before. The ratio is to {reference}: above 1 is faster.",
    )


def _run(workspace: Workspace, path: Path, pattern: str, block: str, jobs: int) -> _Result:
    command = ["fio", "--name=bench", f"--filename={path}", "--readonly", "--ioengine=psync"]
    command += [f"--rw={pattern}", f"--bs={block}", f"--numjobs={jobs}", "--group_reporting"]
    command += [f"--runtime={round(1e3 * _SECONDS)}ms", "--time_based", "--output-format=json"]
    output = workspace.run(command, seconds=_LIMIT_SECONDS)
    (job,) = msgspec.json.decode(output, type=_Output).jobs
    return _Result(job.read.bw_bytes, job.read.clat_ns.percentile.get(_P99, 0) / 1e9)
