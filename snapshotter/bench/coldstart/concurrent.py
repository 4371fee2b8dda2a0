"""Many starts of one image at once, on one node."""

from __future__ import annotations

import statistics
import subprocess
import time
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from snapshotter.bench.coldstart.checks import Asker
from snapshotter.bench.errors import BenchError
from snapshotter.bench.link.namespaces import Connector
from snapshotter.bench.tables import Cell, Table
from snapshotter.bench.timing import drop_caches, interleaved
from snapshotter.demo.workspace import stop_group

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from snapshotter.bench.coldstart.catalogue import Image
    from snapshotter.bench.coldstart.modes import Mode
    from snapshotter.bench.coldstart.nodes import Workload
    from snapshotter.bench.coldstart.session import Session
    from snapshotter.demo.workspace import Workspace

_ANSWER_SECONDS = 10.0
_POLL_SECONDS = 0.005
_SHOWN_LINES = 5


@dataclass(frozen=True, slots=True)
class Storm:
    """Seconds until each of the starts was ready, and bytes and requests on the link until the
    image was all there."""

    ready: Sequence[float]
    bytes: int
    requests: int
    needed_bytes: int


def concurrent(
    session: Session, image: Image, modes: Sequence[Mode], counts: Sequence[int], samples: int
) -> Table:
    """Start an image so many times at once, in each mode. Raises BenchError or DemoError."""
    for mode in modes:
        session.publisher.repository(image, mode.variant)

    def work(mode: Mode, count: int) -> Storm:
        storm = _storm(session, image, mode, count)
        session.say(f"{mode.name}, {count} at once: ready after {max(storm.ready):.2f} s")
        return storm

    works = {(mode.name, n): (lambda m=mode, n=n: work(m, n)) for mode in modes for n in counts}
    return storms_table(
        interleaved(samples, works), image.name, session.place.registry.link.profile.name
    )


def storms_table(
    measured: Mapping[tuple[str, int], Sequence[Storm]], image: str, link: str
) -> Table:
    """What was measured, by mode and number of starts, fewest first."""
    rows: list[tuple[Cell, ...]] = []
    samples: list[Mapping[str, object]] = []
    one: dict[str, tuple[float, float]] = {}
    for (mode, count), storms in measured.items():
        size = statistics.median(storm.bytes for storm in storms)
        needed = statistics.median(storm.needed_bytes for storm in storms)
        first = one.setdefault(mode, (size, needed))
        samples += [{"mode": mode, "starts": count, **asdict(storm)} for storm in storms]
        rows.append(
            (
                mode,
                count,
                statistics.median(min(storm.ready) for storm in storms),
                statistics.median(statistics.median(storm.ready) for storm in storms),
                statistics.median(max(storm.ready) for storm in storms),
                size / 1e6,
                statistics.median(storm.requests for storm in storms),
                size / first[0],
                needed / 1e6,
            )
        )
    return Table(
        f"Starts of one image at once: {image}, {link}",
        (
            "mode",
            "starts",
            "first ready s",
            "median ready s",
            "last ready s",
            "MB in all",
            "requests",
            "bytes / fewest starts",
            "needed MB",
        ),
        tuple(rows),
        "Medians of all rounds; one pull, then as many containers as there are starts, each in a "
        "network of its own. Needed is what FirstByte fetched because somebody waited, or was "
        "about to. Target: 50 starts fetch at most 1.05 times what one does.",
        tuple(samples),
    )


def _storm(session: Session, image: Image, mode: Mode, count: int) -> Storm:
    place, link = session.place, session.place.registry.link
    start = session.start(image, mode)
    reference = f"{place.registry.host}/{start.repository}:latest"
    with ExitStack() as stack:
        networks = [stack.enter_context(_network(session.workspace)) for _ in range(count)]
        node = stack.enter_context(session.node(mode))
        drop_caches()
        place.registry.read_into_memory(start.repository)
        before, began = link.carried(), time.perf_counter()
        node.pull(reference)
        waiting: list[tuple[Workload, Asker]] = []
        for network in networks:
            workload = node.workload(image, reference, network)
            workload.start(image.environment)
            connector = Connector(network)
            stack.callback(connector.close)
            waiting.append((workload, Asker(image.ready, connector, workload.output)))
        ready = _wait_ready(session, image, waiting, began)
        needed = node.needed_bytes() or 0
        session.wait_local(node)
        carried = link.carried().since(before)
    return Storm(ready, carried.down, carried.requests, needed)


def _wait_ready(
    session: Session, image: Image, waiting: list[tuple[Workload, Asker]], began: float
) -> list[float]:
    ready: list[float] = []
    while waiting:
        session.workspace.interruption.sleep(_POLL_SECONDS)
        for workload, asker in tuple(waiting):
            status = workload.exit_status()
            if workload.started() and asker.answered():
                ready.append(time.perf_counter() - began)
                waiting.remove((workload, asker))
            elif status is not None or time.perf_counter() - began > image.within:
                raise BenchError(
                    f"one of several workloads of {image.name} did not get ready",
                    hint=workload.output.last(_SHOWN_LINES) or "it printed nothing",
                )
    return ready


@contextmanager
def _network(workspace: Workspace) -> Iterator[Path]:
    """A network namespace with nothing but a loopback, for a workload that listens there."""
    process = workspace.start(
        ["unshare", "--net", "sh", "-c", "ip link set lo up && echo up && exec sleep infinity"],
        output=subprocess.PIPE,
        errors=subprocess.DEVNULL,
    )
    assert process.stdout
    try:
        if not process.stdout.readline():
            raise BenchError("cannot make a network namespace", hint="run benchmarks as root")
        yield Path(f"/proc/{process.pid}/ns/net")
    finally:
        stop_group(process)
        process.stdout.close()
