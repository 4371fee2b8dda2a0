"""One start, from nothing to a workload that answers and an image that is all there."""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from snapshotter.bench.coldstart.checks import Asker, stalls
from snapshotter.bench.coldstart.results import Sample
from snapshotter.bench.errors import BenchError
from snapshotter.bench.timing import drop_caches
from snapshotter.demo.errors import DemoError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from snapshotter.bench.coldstart.catalogue import Image
    from snapshotter.bench.coldstart.nodes import Node, Workload
    from snapshotter.bench.link.link import DistantRegistry, Link
    from snapshotter.bench.link.namespaces import Connector
    from snapshotter.demo.interruption import Interruption

_POLL_SECONDS = 0.002
_LOCAL_POLL_SECONDS = 0.1
_LOCAL_SECONDS = 3600.0
_CURVE_SECONDS = 0.02  # between points
_MAX_POINTS = 400
_MAX_PULLS = 20  # of a link on which requests fail
_SHOWN_LINES = 8


@dataclass(frozen=True)
class Place:
    """What all starts have in common: the registry behind its link, and the way to workloads."""

    registry: DistantRegistry
    connector: Connector
    interruption: Interruption


@dataclass(frozen=True)
class Start:
    """`image` in a `mode`; its name in the registry is `repository`. A start that is `pulled`
    already is only created. With `wait_local`, until all of the image is on the node."""

    image: Image
    mode: str
    repository: str
    pulled: bool
    wait_local: bool


def measure(place: Place, node: Node, start: Start) -> tuple[Sample, Workload]:
    """Start an image on a node. The workload still runs afterwards.

    Raises BenchError or DemoError if it does not get ready, or its work fails.
    """
    image, link = start.image, place.registry.link
    host = place.registry.direct if start.pulled else place.registry.host
    reference = f"{host}/{start.repository}:latest"
    workload = node.workload(image, reference, link.near)
    drop_caches()
    place.registry.read_into_memory(start.repository)
    at = datetime.now(UTC)
    before, clock = link.carried(), _Clock()
    with _watched(link, clock) as curve:
        pulls, pulled = 0, 0.0
        if not start.pulled:
            pulls, pulled = _pull(place, node, reference), clock.now()
        workload.start(image.environment)
        created, started, ready = _wait_ready(place, workload, image, clock)
        carried = link.carried().since(before)
        lazy = not start.pulled and node.local() is not None
        needed = node.needed_bytes() if lazy else None
        asked = node.fuse_requests()
        work = _work(place, workload, image)
        local: float | None = None
        if lazy and start.wait_local:
            local = _wait_local(place, node, clock)
        elif not lazy:
            local = pulled
    total = link.carried().since(before)
    if curve[-1][1] != total.down:  # some came since the watch ended
        curve.append((clock.now(), total.down))
    usage = node.usage()
    sample = Sample(
        image=image.name,
        mode=start.mode,
        link="" if start.pulled else link.profile.name,
        at=f"{at:%Y-%m-%d %H:%M:%S}",
        pulled=pulled,
        created=created,
        started=started,
        ready=ready,
        ready_bytes=carried.down,
        ready_requests=carried.requests,
        connections=carried.connections,
        total_bytes=total.down,
        total_requests=total.requests,
        failed_requests=total.failed,
        pulls=pulls,
        work=work,
        local=local,
        needed_bytes=needed,
        fuse_requests=asked,
        daemon_cpu_seconds=usage.cpu_seconds,
        daemon_peak_bytes=usage.peak_bytes,
        disk_bytes=usage.disk_bytes,
        curve=_thinned(curve),
        stalls=stalls(workload.output),
    )
    return sample, workload


class _Clock:
    def __init__(self) -> None:
        self._began = time.perf_counter()

    def now(self) -> float:
        return time.perf_counter() - self._began


def _pull(place: Place, node: Node, reference: str) -> int:
    """How often it was tried: a kubelet tries again, too, though not at once."""
    for attempt in range(1, _MAX_PULLS + 1):
        try:
            node.pull(reference)
        except DemoError:
            if not place.registry.link.profile.failures or attempt == _MAX_PULLS:
                raise
        else:
            return attempt
    raise AssertionError


def _wait_ready(
    place: Place, workload: Workload, image: Image, clock: _Clock
) -> tuple[float, float, float]:
    asker = Asker(image.ready, place.connector, workload.output)
    created = started = None
    runtime = None
    while True:
        place.interruption.check()
        now, status = clock.now(), workload.exit_status()
        if created is None and (pid := workload.pid()):
            created = now
            program = Path(f"/proc/{pid}/exe")
            runtime = _target(program)
        if created is not None and started is None and _target(program) != runtime:
            started = now  # the runtime's process has become the workload's, or is gone
        if created is not None and asker.answered():
            ready = clock.now()
            return created, started or ready, ready
        if status is not None and not (image.ready.line and asker.answered()):
            problem = f"ended with status {status} before it was ready"
        elif now > image.within:
            problem = f"was not ready within {image.within:.0f} s"
        else:
            if created is None:
                time.sleep(_POLL_SECONDS)
            continue
        raise BenchError(
            f"the workload of {image.name} {problem}",
            hint=workload.output.last(_SHOWN_LINES) or "it printed nothing",
        )


def _target(link: Path) -> Path | None:
    try:
        return link.readlink()
    except OSError:
        return None


def _work(place: Place, workload: Workload, image: Image) -> float | None:
    if not image.work:
        return None
    began = time.perf_counter()
    Asker(image.work, place.connector, workload.output).work()
    return time.perf_counter() - began


def _wait_local(place: Place, node: Node, clock: _Clock) -> float:
    while clock.now() < _LOCAL_SECONDS:
        state = node.local()
        if state is None or state.here == state.total:
            return clock.now()
        place.interruption.sleep(_LOCAL_POLL_SECONDS)
    raise BenchError(f"the image was not local within {_LOCAL_SECONDS:.0f} s")


@contextmanager
def _watched(link: Link, clock: _Clock) -> Iterator[list[tuple[float, int]]]:
    """Note how many bytes have come until when, during the block."""
    before, points, ended = link.carried().down, [(0.0, 0)], threading.Event()

    def watch() -> None:
        while not ended.wait(_CURVE_SECONDS):
            carried = link.carried().down - before
            if carried != points[-1][1]:
                points.append((clock.now(), carried))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield points
    finally:
        ended.set()
        thread.join()


def _thinned(points: list[tuple[float, int]]) -> list[tuple[float, int]]:
    step = -(-len(points) // _MAX_POINTS)
    kept = [*points[::step], *([points[-1]] if (len(points) - 1) % step else [])]
    return [(round(seconds, 3), count) for seconds, count in kept]
