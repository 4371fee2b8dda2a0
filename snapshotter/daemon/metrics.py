"""The daemon's figures for Prometheus: what they are called, and an HTTP endpoint for them.

Nothing is counted twice: the figures are those of `firstbyte status`, and the plain counters of
the fetch and store rooms, turned into Prometheus's form when somebody asks.
"""

from __future__ import annotations

import logging
import os
import socket
from collections import Counter
from functools import partial
from importlib.metadata import version
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, cast

import trio
from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
)
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from snapshotter.daemon.errors import DaemonError
from snapshotter.daemon.server import listen
from snapshotter.fetch.stats import BOUNDS

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from prometheus_client.metrics_core import Metric
    from prometheus_client.registry import Collector

    from snapshotter.daemon.protocol import ImageStatus, MountStatus, PodmanImage, Status
    from snapshotter.fetch.stats import Durations, FetchStats

log = logging.getLogger(__name__)

_REQUEST_SECONDS = 10.0  # for a client to say what it wants, and to take the answer
_HEAD = 16 << 10  # bytes of a request's head
_CONNECTIONS = 16  # that are answered at once


class _Figures:
    """One moment's figures. A Collector by form alone: types can be checked without the library."""

    def __init__(self, status: Status, stats: FetchStats) -> None:
        self._status = status
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        yield InfoMetricFamily(
            "firstbyte", "The program that runs.", value={"version": version("firstbyte")}
        )
        yield from self._fetching()
        yield from self._store()
        yield from self._images()
        yield from self._containerd()

    def _fetching(self) -> Iterator[Metric]:
        stats = self._stats
        requests = _counter("fetch_requests", "Requests to registries, by what for.", ["class"])
        received = _counter(
            "fetch_received_bytes", "Compressed bytes from registries, by what for.", ["class"]
        )
        for kind, count in stats.requests.items():
            requests.add_metric([kind.name.lower()], count)
            received.add_metric([kind.name.lower()], stats.received_bytes[kind])
        yield requests
        yield received
        yield _counter("fetch_retries", "Requests that were made again.", value=stats.retries)
        yield _counter("fetch_damaged", "Chunks and spans that came damaged.", value=stats.damaged)
        yield _histogram(
            "fetch_latency_seconds", "From a request to its first byte.", stats.latencies
        )
        reads = _counter(
            "reads", "Reads of layers: hits were answered at once, misses waited.", ["result"]
        )
        reads.add_metric(["hit"], stats.hits)
        reads.add_metric(["miss"], sum(stats.stalls.counts))
        yield reads
        yield _histogram("read_stall_seconds", "How long reads waited that did.", stats.stalls)

    def _store(self) -> Iterator[Metric]:
        store = self._status.store
        if store is None:
            return
        yield _gauge("store_used_bytes", "Disk that images' data takes.", store.used)
        yield _gauge("store_limit_bytes", "The most that it may take now.", store.limit)
        yield _gauge("store_disk_free_bytes", "What is free on its disk.", store.free)
        yield _gauge(
            "store_full", "1 while what is read is not kept for lack of room.", bool(store.problem)
        )
        yield _counter(
            "store_evicted_bytes", "Disk that was freed to make room.", value=store.evicted
        )

    def _images(self) -> Iterator[Metric]:
        mounts = GaugeMetricFamily(
            "firstbyte_mounts", "Mounts by mode and state.", labels=["mode", "state"]
        )
        shown = Counter((mount.mode or "none", mount.state) for mount in self._status.mounts)
        for (mode, state), count in shown.items():
            mounts.add_metric([mode, state], count)
        yield mounts
        yield _counter(
            "fuse_requests", "What the kernel has asked.", value=self._status.fuse_requests
        )
        containerd = self._status.containerd
        shown_images: list[MountStatus | ImageStatus | PodmanImage] = [
            *self._status.mounts,
            *self._status.podman,
            *(containerd.images if containerd else ()),
        ]
        images = {one.digest: one for one in shown_images if one.mode}
        states = GaugeMetricFamily("firstbyte_images", "Open images by state.", labels=["state"])
        for state, count in Counter(image.state for image in images.values()).items():
            states.add_metric([state], count)
        yield states
        yield _gauge(
            "images_local_bytes",
            "Unpacked bytes of open images that are on this node.",
            sum(image.local_bytes for image in images.values()),
        )
        yield _gauge(
            "images_size_bytes",
            "Unpacked bytes of open images.",
            sum(image.total_bytes for image in images.values()),
        )

    def _containerd(self) -> Iterator[Metric]:
        containerd = self._status.containerd
        if containerd is None:
            return
        snapshots = GaugeMetricFamily(
            "firstbyte_containerd_snapshots", "Snapshots by kind.", labels=["kind"]
        )
        snapshots.add_metric(["lazy"], containerd.lazy_layers)
        snapshots.add_metric(["ordinary"], containerd.ordinary_layers)
        snapshots.add_metric(["container"], containerd.containers)
        snapshots.add_metric(["view"], containerd.views)
        yield snapshots
        fallbacks = _counter(
            "containerd_fallbacks", "Layers that could not be lazy, by reason.", ["kind"]
        )
        kinds: Counter[str] = Counter()
        for fallback in containerd.fallbacks:
            kinds[fallback.kind] += fallback.count
        for kind, count in kinds.items():
            fallbacks.add_metric([kind], count)
        yield fallbacks
        calls = _counter("containerd_calls", "containerd's calls.", ["method", "code"])
        took = _counter(
            "containerd_call_seconds", "Time that containerd's calls took.", ["method", "code"]
        )
        for call in containerd.calls:
            calls.add_metric([call.method, call.code], call.count)
            took.add_metric([call.method, call.code], call.seconds)
        yield calls
        yield took


def page(status: Status, stats: FetchStats) -> bytes:
    """All figures in Prometheus's text format. Blocks for a moment: /proc is read."""
    registry = CollectorRegistry(auto_describe=False)
    ProcessCollector(registry=registry)
    registry.register(cast("Collector", _Figures(status, stats)))
    text: bytes = generate_latest(registry)
    return text


async def serve_metrics(
    address: str,
    status: Callable[[], Awaitable[Status]],
    stats: FetchStats,
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Answer GET /metrics at an address, HOST:PORT or the path of a unix socket, until cancelled.

    A daemon that cannot listen there serves images all the same, and logs it.
    """
    try:
        listener = await trio.to_thread.run_sync(_listen, address)
    except DaemonError as error:
        log.error("%s", error)
        task_status.started()
        return
    limit = trio.CapacityLimiter(_CONNECTIONS)

    async def answer(stream: trio.SocketStream) -> None:
        async with limit, stream:
            with trio.move_on_after(_REQUEST_SECONDS):
                try:
                    await _answer(stream, status, stats)
                except (trio.BrokenResourceError, trio.ClosedResourceError):
                    pass
                except Exception:
                    log.exception("metrics could not be told")

    try:
        task_status.started()
        log.info("metrics at %s", address)
        await trio.serve_listeners(answer, [listener])
    finally:
        listener.socket.close()
        if address.startswith("/"):
            Path(address).unlink(missing_ok=True)  # noqa: ASYNC240  (on a tmpfs, most likely)


async def _answer(
    stream: trio.SocketStream, status: Callable[[], Awaitable[Status]], stats: FetchStats
) -> None:
    head = b""
    while b"\r\n\r\n" not in head and len(head) < _HEAD:
        piece = await stream.receive_some(_HEAD)
        if not piece:
            return
        head += piece
    method, _, rest = head.split(b"\r\n", 1)[0].partition(b" ")
    path = rest.partition(b" ")[0].partition(b"?")[0]
    if method not in (b"GET", b"HEAD"):
        code, body = "405 Method Not Allowed", b"GET alone\n"
    elif path != b"/metrics":
        code, body = "404 Not Found", b"there is /metrics\n"
    else:
        now = await status()
        code, body = "200 OK", await trio.to_thread.run_sync(partial(page, now, stats))
    kind = CONTENT_TYPE_LATEST if code.startswith("200") else "text/plain"
    answer = (
        f"HTTP/1.1 {code}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n"
        "Connection: close\r\n\r\n"
    ).encode()
    await stream.send_all(answer if method == b"HEAD" else answer + body)


def _listen(address: str) -> trio.SocketListener:
    if address.startswith("/"):
        return listen(Path(address))
    host, _, port = address.rpartition(":")
    try:
        family, kind, number, _, place = socket.getaddrinfo(
            host.strip("[]"), int(port), type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST
        )[0]
        listening = socket.socket(family, kind, number)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(place)
        listening.listen()
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else error
        raise DaemonError(
            f"cannot serve metrics at {address}: {reason}",
            hint="metrics.address in the configuration says where",
        ) from error
    return trio.SocketListener(trio.socket.from_stdlib_socket(listening))


def _counter(
    name: str, about: str, labels: list[str] | None = None, value: float | None = None
) -> CounterMetricFamily:
    return CounterMetricFamily(f"firstbyte_{name}", about, value=value, labels=labels)


def _gauge(name: str, about: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"firstbyte_{name}", about, value=value)


def _histogram(name: str, about: str, durations: Durations) -> HistogramMetricFamily:
    bounds = [*map(str, BOUNDS), "+Inf"]
    buckets = list(zip(bounds, accumulate(durations.counts), strict=True))
    return HistogramMetricFamily(
        f"firstbyte_{name}", about, buckets=buckets, sum_value=durations.total
    )
