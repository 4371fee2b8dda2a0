"""Many containers of many images at once, while images are removed and pulled again."""

from __future__ import annotations

import random
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING

import grpc
import pytest

from snapshotter.containerd.server import WORKERS
from tests.support.gateway import Gateway, gateway
from tests.support.instance import firstbyte, wait_until
from tests.support.lazy_workloads import all_local
from tests.support.leaks import becomes, footprint, left_in
from tests.support.many_images import SharingImage, push_many_images

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tests.support.cri import Cri
    from tests.support.lazy_node import LazyNode
    from tests.support.registry import RunningRegistry

pytestmark = pytest.mark.root

CONTAINERS = 30
REMOVERS = 2
ATTEMPTS = 20
RATE = 8e6  # bytes a second: containers read what the background download has not fetched yet
MORE_THAN_ONCE = 1.05
OVERHEAD = 1.10  # manifests, configurations and file indexes, as each of the pulls asks for them
THREADS = WORKERS + 40 + 16  # gRPC's, trio's default limit, those with limits of their own
SOCKETS = 32  # connections to the registry that are kept for a while
MEMORY = 16 << 20  # bytes that a third round may take more than a second


@pytest.fixture(scope="module")
def images(
    registry: RunningRegistry, shell_image: str, tmp_path_factory: pytest.TempPathFactory
) -> list[SharingImage]:
    firstbyte("index", "build", "--push", shell_image)
    return push_many_images(registry, tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def way(registry: RunningRegistry) -> Iterator[Gateway]:
    with gateway(registry.host, rate=RATE) as made:
        yield made


def test_a_storm_leaves_nothing_and_fetches_nothing_twice(
    any_lazy_node: LazyNode, images: list[SharingImage], way: Gateway, shell_image: str
) -> None:
    node = any_lazy_node
    node.cri.pull(shell_image)  # of sandboxes; it stays
    wait_until(lambda: all_local(node))
    with node.cri.pod():
        pass  # it is shown by the kernel from now on
    # containerd removes the pod's snapshot with the next image.
    left = [entry for entry in left_in(node.here) if not entry.startswith("containerd/")]
    mounts = node.here.mounts()
    at_first = footprint(node.daemon.pid)

    def remove_all() -> None:
        for image in images:
            node.cri.remove_image(way.reference(image.repository))
        becomes(lambda: left_in(node.here), left)
        becomes(lambda: footprint(node.daemon.pid).files, at_first.files)
        assert node.here.mounts() == mounts
        assert node.containerd.mounts() == []

    before, carried = _fetched_bytes(node), way.carried
    _storm(node.cri, images, way)
    wait_until(lambda: all_local(node))
    size = sum({digest: n for image in images for digest, n in image.blobs.items()}.values())
    assert 0.99 <= (_fetched_bytes(node) - before) / size <= MORE_THAN_ONCE
    assert way.carried - carried <= size * OVERHEAD
    remove_all()

    memory = []
    for number in (2, 3):
        with _removing(node.cri, images, way, seed=number):
            _storm(node.cri, images, way)
        remove_all()
        now = footprint(node.daemon.pid)
        assert now.threads <= THREADS
        assert now.other <= at_first.other + SOCKETS
        memory.append(now.resident)
    assert memory[1] <= memory[0] + MEMORY, memory

    status = node.status()
    assert status["fallbacks"] == []
    assert {call["code"] for call in status["calls"]} <= {"OK", "ALREADY_EXISTS", "NOT_FOUND"}
    node.cri.remove_image(shell_image)
    becomes(lambda: left_in(node.here), [])


def _storm(cri: Cri, images: Sequence[SharingImage], way: Gateway) -> None:
    """Start all containers at once; each must read the right bytes."""
    with ThreadPoolExecutor(CONTAINERS) as threads:
        started = [
            threads.submit(_run, cri, images[number % len(images)], way)
            for number in range(CONTAINERS)
        ]
    for future in started:
        future.result()


def _run(cri: Cri, image: SharingImage, way: Gateway) -> None:
    """Pull an image and run it in a pod, as a kubelet does, until it is not removed meanwhile."""
    reference = way.reference(image.repository)
    for _ in range(ATTEMPTS):
        with cri.pod() as pod:
            try:
                cri.pull(reference)
                container = pod.start(reference, *image.command)
            except grpc.RpcError as error:
                _must_be_removed(error)
                continue
            assert container.wait().exit_code == 0, container.output()
            assert container.output() == image.printed
            return
    pytest.fail(f"{reference} was removed {ATTEMPTS} times")


@contextmanager
def _removing(
    cri: Cri, images: Sequence[SharingImage], way: Gateway, *, seed: int
) -> Iterator[None]:
    """Remove random images and pull them again, for as long as the block runs."""
    over = threading.Event()

    def remove(number: int) -> None:
        source = random.Random(f"{seed} {number}")
        while not over.is_set():
            reference = way.reference(source.choice(images).repository)
            cri.remove_image(reference)
            try:
                cri.pull(reference)
            except grpc.RpcError as error:
                _must_be_removed(error)

    with ThreadPoolExecutor(REMOVERS) as threads:
        removers = [threads.submit(remove, number) for number in range(REMOVERS)]
        try:
            yield
        finally:
            over.set()
    for future in removers:
        future.result()


def _must_be_removed(error: grpc.RpcError) -> None:
    """An image that somebody else removes is "not found" to whoever pulls or starts it.

    So it is with containerd's own overlayfs: in the same storm, both versions answer some
    CreateContainers with NOT_FOUND ("failed to resolve image"), 2.1 also some PullImages
    ("failed to get image ... from containerd image store"). Kubelets try again.
    """
    assert error.code() is grpc.StatusCode.NOT_FOUND, error.details()


def _fetched_bytes(node: LazyNode) -> int:
    """Bytes of layers that came over the network."""
    return sum(fetched["bytes"] for fetched in node.here.status()["fetched"].values())
