"""The same files in one layer and in many: what containerd's pull and start cost by layers.

Uses what the demo has: a registry, a daemon and a containerd of its own, all in one workspace.
"""

from __future__ import annotations

import shutil
import statistics
import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from snapshotter.bench.errors import BenchError
from snapshotter.bench.tables import Cell, Table
from snapshotter.bench.timing import drop_caches, interleaved
from snapshotter.demo.containerd import Containerd
from snapshotter.demo.errors import DemoError
from snapshotter.demo.image import package_layers
from snapshotter.demo.layout import write_image, write_layer
from snapshotter.demo.lazy import Node, build_index
from snapshotter.demo.packages import Packages
from snapshotter.demo.registry import LocalRegistry
from snapshotter.demo.task import Task
from snapshotter.demo.workspace import mounts_below
from snapshotter.registry.platform import Platform
from snapshotter.registry.reference import LAYOUT_PREFIX

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from snapshotter.daemon.protocol import Calls
    from snapshotter.demo.layout import Member
    from snapshotter.demo.workspace import Workspace

_PACKAGES = ("base-files", "bash", "coreutils")
_COMMAND = ("bash", "-c", "ls -lR /usr >/dev/null")  # looks at all that is there, reads programs
_START_SECONDS = 120.0
_POLL_SECONDS = 0.002
_SHOWN_LINES = 5

_LAZY, _UNPACKED = "FirstByte", "overlayfs"


@dataclass(frozen=True, slots=True)
class Start:
    """Seconds of a pull, and then until a container had run to its end."""

    pull: float
    run: float
    calls: Sequence[Calls]  # of the snapshotter, if it is ours


@dataclass(frozen=True, slots=True)
class Refused:
    """containerd or the kernel would not have an image of so many layers."""

    reason: str


def many_layers(workspace: Workspace, counts: Sequence[int], samples: int) -> list[Table]:
    """Pull and start one image in one layer, and in as many as each of `counts` says, on nodes
    that are new each time. Needs root.
    """
    counts = sorted({1, *counts})
    members = [
        member for layer in package_layers(Packages.installed(), [_PACKAGES]) for member in layer
    ]
    if counts[-1] > len(members):
        raise BenchError(f"there are only {len(members)} files for {counts[-1]} layers")
    registry = LocalRegistry(workspace)
    references = {count: _publish(workspace, registry, members, count) for count in counts}
    number = 0

    def start(snapshotter: str, count: int) -> Start | Refused:
        nonlocal number
        number += 1
        return _start(workspace, f"node-{number}", references[count], lazy=snapshotter == _LAZY)

    works: dict[tuple[str, int], Callable[[], Start | Refused]] = {
        (snapshotter, count): partial(start, snapshotter, count)
        for snapshotter in (_LAZY, _UNPACKED)
        for count in counts
    }
    measured = interleaved(samples, works)
    version = workspace.run(["containerd", "--version"], seconds=_START_SECONDS).split()[2]
    what = f"{len(members)} files and directories, containerd {version}"
    return [starts_table(measured, what, samples), _calls(measured)]


def _publish(
    workspace: Workspace, registry: LocalRegistry, members: Sequence[Member], count: int
) -> str:
    """Push the image in so many layers, with its file index; its name."""
    layout = workspace.path / f"layout-{count}"
    blobs = workspace.directory(layout.name, "blobs", "sha256")
    check = workspace.interruption.check
    layers = [
        write_layer(blobs, f"layer-{number}", piece, check)
        for number, piece in enumerate(_pieces(members, count))
    ]
    platform = Platform.host()
    config = {
        "architecture": platform.architecture,
        "os": platform.os,
        "config": {"Env": ["PATH=/usr/bin:/bin"], "Cmd": _COMMAND},
    }
    write_image(layout, "bench", layers, config)
    name = f"layers-{count}:latest"
    registry.copy_in(f"{LAYOUT_PREFIX}{layout}:bench", name)
    reference = f"{registry.host}/{name}"
    build_index(workspace, reference)
    shutil.rmtree(layout)
    return reference


def _pieces(members: Sequence[Member], count: int) -> Iterator[Sequence[Member]]:
    """Cut into so many pieces, none empty."""
    for number in range(count):
        yield members[number * len(members) // count : (number + 1) * len(members) // count]


def _start(workspace: Workspace, name: str, reference: str, *, lazy: bool) -> Start | Refused:
    node = Node(workspace, name) if lazy else None
    containerd = Containerd(workspace, f"{name}-containerd", node.address if node else None)
    drop_caches()
    task = Task(containerd, "start", reference)
    began = time.perf_counter()
    try:
        containerd.pull(reference)
        pulled = time.perf_counter()
        _run(workspace, task)
        ended = time.perf_counter()
        if node:
            node.local()  # raises if it was not lazy
    except DemoError as error:
        if lazy:
            raise
        return Refused(error.hint or error.message)
    finally:
        task.stop()
        asked = node.status().containerd if node else None
        calls = asked.calls if asked else ()
        containerd.stop()
        if node:
            node.stop()
        for directory in (containerd.directory, workspace.path / name):
            if directory.exists() and not mounts_below(directory):
                shutil.rmtree(directory)
    return Start(pulled - began, ended - pulled, calls)


def _run(workspace: Workspace, task: Task) -> None:
    """Run a container to its end. Raises DemoError if it fails."""
    task.start({})
    end = time.monotonic() + _START_SECONDS
    while (status := task.exit_status()) is None and time.monotonic() < end:
        workspace.interruption.sleep(_POLL_SECONDS)
    if status != 0:
        raise DemoError(f"the container ended with {status}", hint=task.output.last(_SHOWN_LINES))


def starts_table(
    measured: Mapping[tuple[str, int], Sequence[Start | Refused]], what: str, samples: int
) -> Table:
    """What was measured for each snapshotter and number of layers, one layer first; `what` was."""
    rows: list[tuple[Cell, ...]] = []
    ones: dict[str, tuple[float, float, float]] = {}
    reasons = []
    for (snapshotter, count), starts in measured.items():
        refused = [start.reason for start in starts if isinstance(start, Refused)]
        if refused:
            rows.append((snapshotter, count, *["refused"] * 6))
            reasons.append(f"{snapshotter} with {count} layers: {refused[0]}")
            continue
        done = [start for start in starts if isinstance(start, Start)]
        times = (
            statistics.median(start.pull for start in done),
            statistics.median(start.run for start in done),
            statistics.median(start.pull + start.run for start in done),
        )
        one = ones.setdefault(snapshotter, times)  # that of one layer comes first
        ratios = (time / first for time, first in zip(times, one, strict=True))
        rows.append((snapshotter, count, *times, *ratios))
    return Table(
        "The same files in one layer and in many",
        ("snapshotter", "layers", "pull s", "run s", "both s", "pull ratio", "run ratio", "ratio"),
        tuple(rows),
        f"{what}; pulled through the CRI from a registry on loopback, then `{' '.join(_COMMAND)}` "
        f"run with ctr from its start to its end. Medians of {samples} rounds, each on a node with "
        "nothing in its stores and the page cache dropped. Ratios are to one layer. "
        + " ".join(reasons),
    )


def _calls(measured: Mapping[tuple[str, int], Sequence[Start | Refused]]) -> Table:
    rows = []
    for (snapshotter, count), starts in measured.items():
        if snapshotter != _LAZY:
            continue
        every = [calls for start in starts if isinstance(start, Start) for calls in start.calls]
        for method in sorted({calls.method for calls in every}):
            ours = [calls for calls in every if calls.method == method]
            number = sum(calls.count for calls in ours)
            seconds = sum(calls.seconds for calls in ours)
            rows.append((count, method, number / len(starts), 1e3 * seconds / number))
    return Table(
        "What containerd asks of FirstByte for it",
        ("layers", "call", "calls a start", "ms a call"),
        tuple(rows),
        "Means, within the daemon: from a call's arrival at a thread to its answer.",
    )
