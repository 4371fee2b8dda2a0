"""Containers of containerd read on, and read right, whatever happens to the daemon."""

from __future__ import annotations

import os
import random
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import grpc
import pytest

from tests.support.gateway import Gateway, gateway
from tests.support.lazy_workloads import workload_node
from tests.support.leaks import becomes, left_in
from tests.support.workload import ALL, FRESH, RIGHT, Seen, push_workload

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from tests.support.containerd import RunningContainerd
    from tests.support.cri import Cri
    from tests.support.registry import RunningRegistry

T = TypeVar("T")

pytestmark = pytest.mark.root

KILLS = int(os.environ.get("FIRSTBYTE_KILLS", "4"))
"""In each mode; the environment variable is for those who want more."""

RATE = 10e6  # bytes a second: containers read what the background download has not brought yet
SECONDS = 120.0  # for a call that is made again, and for a container to end


@pytest.fixture(scope="module")
def way(registry: RunningRegistry, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    push_workload(registry, tmp_path_factory.mktemp("workload"))
    with gateway(registry.host, rate=RATE) as made:
        yield made


@pytest.mark.parametrize("mode", ["fuse", "erofs"])
def test_containers_see_nothing_of_a_daemon_that_is_killed_again_and_again(
    run_containerd: Callable[..., AbstractContextManager[RunningContainerd]],
    way: Gateway,
    shell_image: str,
    mode: str,
) -> None:
    """Pods and containers are started meanwhile. What containerd says of the moment in which there
    is no daemon is UNAVAILABLE, and as a kubelet we try again."""
    source = random.Random(6)
    reference = way.reference("workload")
    seen = Seen()
    with workload_node(run_containerd, "2.1", f'[mounts]\nmode = "{mode}"') as node:
        cri = node.cri
        cri.pull(reference)
        pod = cri.run_pod("reads")
        reader = pod.start(reference, *ALL)
        over = threading.Event()
        starts = threading.Thread(target=_start_fresh, args=(cri, reference, over, seen))
        starts.start()
        try:
            for _ in range(KILLS):
                time.sleep(source.uniform(0, 1))
                Path("/proc/sys/vm/drop_caches").write_text("3")
                node.daemon.kill()
                node.daemon.wait()
                node.daemon = node.here.start()
        finally:
            over.set()
            starts.join()
        assert reader.execute("/bin/sh", "-c", "> /stop", seconds=60).exit_code == 0
        assert reader.wait(SECONDS).exit_code == 0
        lines = reader.output().splitlines()
        seen.read(lines)
        print(f"{mode}: {KILLS} kills; rounds: {seen.rounds}; longest read: {seen.longest:.2f} s")
        assert seen.problems == []
        assert "ended" in lines
        assert seen.rounds["fresh starts"]
        _again(pod.remove)
        for image in (reference, shell_image):
            _again(lambda image=image: cri.remove_image(image))
        becomes(lambda: left_in(node.here), [])
        assert node.containerd.mounts() == []


def _start_fresh(cri: Cri, reference: str, over: threading.Event, seen: Seen) -> None:
    """Until told to stop, run one container after the other in a pod of its own."""
    while not over.is_set() or not seen.rounds.get("fresh starts"):
        try:
            problem = _start_one(cri, reference)
        except grpc.RpcError as error:
            problem = f"{error.code()}: {error.details()}"
        if problem:
            seen.problems.append(f"fresh starts: {problem}")
            return
        seen.add("fresh starts")


def _start_one(cri: Cri, reference: str) -> str:
    pod = _again(lambda: cri.run_pod("fresh"))
    try:
        container = _again(lambda: pod.start(reference, *FRESH))
        ended = container.wait(SECONDS).exit_code
        said = container.output().strip()
    finally:
        _again(pod.remove)
    return "" if (ended, said) == (0, RIGHT) else f"{ended}: {said}"


def _again(call: Callable[[], T]) -> T:
    """The same call until it works; UNAVAILABLE is all that may be wrong with it."""
    deadline = time.monotonic() + SECONDS
    while True:
        try:
            return call()
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.UNAVAILABLE or time.monotonic() > deadline:
                raise
        time.sleep(0.05)
