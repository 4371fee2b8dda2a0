"""Taking times so that they can be compared on a machine that is never quite idle."""

from __future__ import annotations

import os
import signal
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from snapshotter.bench.errors import BenchError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

_DROP_CACHES = Path("/proc/sys/vm/drop_caches")
_PAGES_AND_INODES = "3"  # Linux, Documentation/admin-guide/sysctl/vm.rst

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_K = TypeVar("_K")
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds that passed, and seconds of processor time that this process took meanwhile."""

    seconds: float
    cpu_seconds: float


def once(work: Callable[[], object]) -> Timing:
    """Time one call."""
    cpu, clock = time.process_time(), time.perf_counter()
    work()
    return Timing(time.perf_counter() - clock, time.process_time() - cpu)


def at_once(works: Sequence[Callable[[], None]]) -> Timing:
    """Time works that run at the same time, each in a process of its own: threads would wait for
    each other inside Python. One work runs in this process. Raises BenchError if one fails.
    """
    if len(works) == 1:
        return once(works[0])
    ready, gate = os.pipe(), os.pipe()
    children = [_fork(work, ready, gate) for work in works]
    os.close(ready[1])
    os.close(gate[0])
    waiting = sum(len(os.read(ready[0], 1)) for _ in works)
    statuses: list[int] = []

    def work() -> None:
        os.close(gate[1])
        statuses.extend(os.waitpid(child, 0)[1] for child in children)

    try:
        timing = once(work)
    except BaseException:  # interrupted: nobody is to go on reading
        for child in children[len(statuses) :]:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        raise
    finally:
        os.close(ready[0])
    if waiting < len(works) or any(statuses):
        raise BenchError("one of several processes that were measured failed")
    return timing


def fork() -> int:
    """`os.fork` in which no signal is lost: Python calls some functions then, and forgets what a
    handler raises in them. The child is ended by signals: what they mean is its parent's business.
    """
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        child = os.fork()
        if not child:
            for number in _SIGNALS:
                signal.signal(number, signal.SIG_DFL)
        return child
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _fork(work: Callable[[], None], ready: tuple[int, int], gate: tuple[int, int]) -> int:
    """A child that says when it is ready, works when the gate's last writer is gone, and ends."""
    parent = os.getpid()
    child = fork()
    if child:
        return child
    status = 1
    try:
        os.close(gate[1])
        os.write(ready[1], b"+")
        os.close(ready[1])
        os.read(gate[0], 1)
        if os.getppid() == parent:  # else it was interrupted
            work()
            status = 0
    finally:
        os._exit(status)


def interleaved(samples: int, works: Mapping[_K, Callable[[], _T]]) -> dict[_K, list[_T]]:
    """Run all works in turn, `samples` times: what disturbs the machine disturbs them alike.

    Every other round goes backwards, so that none always comes after the same one.
    """
    results: dict[_K, list[_T]] = {key: [] for key in works}
    order = list(works)
    for _ in range(samples):
        for key in order:
            results[key].append(works[key]())
        order.reverse()
    return results


def median(timings: Sequence[Timing]) -> Timing:
    """The medians of both times."""
    return Timing(
        statistics.median(timing.seconds for timing in timings),
        statistics.median(timing.cpu_seconds for timing in timings),
    )


def drop_caches() -> None:
    """Make the kernel forget file contents, names and inodes. Raises BenchError."""
    os.sync()  # what is not on disk yet cannot be forgotten
    try:
        _DROP_CACHES.write_text(_PAGES_AND_INODES)
    except OSError as error:
        raise BenchError(
            f"cannot empty the page cache: {error.strerror}", hint="run benchmarks as root"
        ) from error
