"""The daemon ends or dies between any two calls of containerd, and comes back."""

from __future__ import annotations

import base64
import hashlib
import json
import random
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import grpc
import pytest

from snapshotter.containerd.labels import IMAGE
from tests.support.gateway import Gateway, gateway
from tests.support.grpc_clients import SnapshotsClient
from tests.support.instance import POLL_SECONDS, WAIT_SECONDS, Instance, instance, wait_until
from tests.support.lazy_images import mounted
from tests.support.lazy_workloads import all_local
from tests.support.leaks import becomes, left_in
from tests.support.many_images import SharingImage, push_many_images
from tests.support.registry import PASSWORD, USERNAME, docker_registry

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable, Iterator, Sequence

    from tests.support.cri import Pod
    from tests.support.lazy_node import LazyNode

pytestmark = pytest.mark.root

T = TypeVar("T")

RATE = 6e6  # bytes a second: the download of an image takes about a second
CRASHES = 10  # of each version of containerd
AUTH = (USERNAME, PASSWORD)
WAYS_TO_END = [signal.SIGTERM, signal.SIGKILL]


@pytest.fixture(scope="module", autouse=True)
def docker_config(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where all daemons of these tests look for credentials."""
    directory = tmp_path_factory.mktemp("docker")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DOCKER_CONFIG", str(directory))
        yield directory / "config.json"


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("storage")


@pytest.fixture(scope="module")
def images(storage: Path, tmp_path_factory: pytest.TempPathFactory) -> list[SharingImage]:
    with docker_registry(storage) as open_to_all:
        return push_many_images(open_to_all, tmp_path_factory.mktemp("images"), 2)


@pytest.fixture(scope="module")
def way(storage: Path, images: list[SharingImage], docker_config: Path) -> Iterator[Gateway]:
    """To a registry with all images that wants a password, which the daemon knows."""
    with (
        docker_registry(storage, password=True) as registry,
        gateway(registry.host, rate=RATE) as made,
    ):
        pair = base64.b64encode(":".join(AUTH).encode()).decode()
        docker_config.write_text(json.dumps({"auths": {made.host: {"auth": pair}}}))
        yield made


@pytest.fixture
def node(any_lazy_node: LazyNode) -> Iterator[LazyNode]:
    """One whose daemon runs, before and after the test."""
    yield any_lazy_node
    if any_lazy_node.daemon.poll() is not None:
        _start(any_lazy_node)


@pytest.mark.parametrize("number", WAYS_TO_END, ids=lambda number: number.name)
def test_every_call_works_once_the_daemon_is_back(
    node: LazyNode,
    images: list[SharingImage],
    way: Gateway,
    docker_config: Path,
    shell_image: str,
    number: signal.Signals,
) -> None:
    """What containerd says meanwhile is UNAVAILABLE, if anything; containers that run go on."""
    cri, image = node.cri, images[0]
    reference = way.reference(image.repository)

    def pull() -> None:
        cri.pull(reference, auth=AUTH)

    def run(pod: Pod) -> None:
        container = pod.start(reference, *image.command)
        assert container.wait().exit_code == 0, container.output()
        assert container.output() == image.printed

    @contextmanager
    def new_pod() -> Iterator[Pod]:
        pod = _once_it_is_back(cri.run_pod)
        try:
            yield pod
        finally:
            pod.remove()

    _once_it_is_back(lambda: cri.pull(shell_image))  # of sandboxes
    wait_until(lambda: all_local(node))
    left = left_in(node.here)

    _while_it_is_absent(node, number, pull)
    cri.remove_image(reference)
    _once_it_is_back(lambda: cri.pull(shell_image))
    becomes(lambda: left_in(node.here), left)  # else its snapshots serve for the next pull
    with ThreadPoolExecutor(1) as thread:
        with way.held_at(b"/manifests/sha256-") as reached:  # the daemon looks for the file index
            pulling = thread.submit(_fails, pull)
            assert reached.wait(WAIT_SECONDS)
            _end(node, number)
        _start(node)
        pulling.result()
    _once_it_is_back(pull)
    wait_until(lambda: all_local(node))

    with _cut_off(way, docker_config):
        _end(node, number)
        _start(node)
        assert all_local(node)
        with new_pod() as pod:
            run(pod)
            running = pod.start(reference)
            _while_it_is_absent(node, number, lambda: pod.create(reference))
            assert running.status().state == "running"
            assert _once_it_is_back(lambda: running.execute("ls", "/")).exit_code == 0
            _once_it_is_back(lambda: run(pod))
            running.stop()
            running.remove()
        with _absent(node, number):
            cri.remove_image(reference)  # containerd tells us when it collects its garbage
    _once_it_is_back(pull)
    _end(node, number)
    _start(node)
    with new_pod() as pod:
        run(pod)
    cri.remove_image(reference)
    becomes(lambda: left_in(node.here), left)
    assert node.containerd.mounts() == []
    assert node.status()["fallbacks"] == []


def test_a_daemon_that_is_killed_at_any_moment_of_a_pull(
    node: LazyNode, images: list[SharingImage], way: Gateway, shell_image: str
) -> None:
    cri = node.cri
    references = [way.reference(image.repository) for image in images]
    for seed in range(CRASHES):
        source = random.Random(seed)
        with ThreadPoolExecutor(len(images)) as threads:
            for reference in references:
                threads.submit(_try, lambda name=reference: cri.pull(name, auth=AUTH))
            time.sleep(source.uniform(0, 0.5))
            _end(node, signal.SIGKILL)
        _start(node)
        with SnapshotsClient(_socket(node.here)) as client:
            _must_be_consistent(client)
            for reference in references:
                _once_it_is_back(lambda name=reference: cri.pull(name, auth=AUTH))
            _must_be_right(client, images)
        for reference in source.sample(references, source.randrange(len(references) + 1)):
            cri.remove_image(reference)
    for reference in (*references, shell_image):
        cri.remove_image(reference)
    becomes(lambda: left_in(node.here), [])
    assert node.status()["fallbacks"] == []


@pytest.mark.parametrize("number", WAYS_TO_END, ids=lambda number: number.name)
def test_mounts_that_containerd_made_outlive_the_daemon(
    node: LazyNode, images: list[SharingImage], way: Gateway, number: signal.Signals
) -> None:
    image = images[1]
    _once_it_is_back(lambda: node.cri.pull(way.reference(image.repository), auth=AUTH))
    path, digest = next(iter(image.files.items()))
    with ExitStack() as stack:
        client = stack.enter_context(SnapshotsClient(_socket(node.here)))
        top = _top(client, image)
        bind, overlay = node.here.base / "bind", node.here.base / "overlay"
        over = stack.enter_context(mounted(client.prepare("container", top), overlay))
        shown = stack.enter_context(mounted(client.view("view", top), bind))
        assert _digest_of(shown, path) == digest
        _end(node, number)
        _start(node)
        Path("/proc/sys/vm/drop_caches").write_text("3")
        assert _digest_of(shown, path) == digest
        assert _digest_of(over, path) == digest
    with SnapshotsClient(_socket(node.here)) as client:
        client.remove("view")
        client.remove("container")
    node.cri.remove_image(way.reference(image.repository))


def test_daemons_side_by_side() -> None:
    with instance() as one, instance() as other:
        processes = [here.start() for here in (one, other)]
        for here in (one, other):
            _wait_for(here)
        with SnapshotsClient(_socket(one)) as first, SnapshotsClient(_socket(other)) as second:
            first.prepare("a")
            second.prepare("b")
            assert [info.name for info in first.list()] == ["a"]
            _stop(one, processes[0])
            assert [info.name for info in second.list()] == ["b"]
        _stop(other, processes[1])


def test_a_second_daemon_in_the_same_directories_is_refused() -> None:
    with instance() as one, instance() as other:
        process = one.start()
        _wait_for(one)
        assert f"another daemon is running with the state directory {one.state}" in one.fail(
            "daemon"
        )
        other.root = one.root
        assert f"{one.root} is in use by another process" in other.fail("daemon")
        with SnapshotsClient(_socket(one)) as client:
            client.prepare("a")
        _stop(one, process)


# --- the daemon ---


def _end(node: LazyNode, number: signal.Signals) -> None:
    node.daemon.send_signal(number)
    status = node.daemon.wait(WAIT_SECONDS)
    if number is signal.SIGTERM:
        _must_have_ended_well(node.here, status)


def _start(node: LazyNode) -> None:
    node.daemon = node.here.start()
    _wait_for(node.here)


@contextmanager
def _absent(node: LazyNode, number: signal.Signals) -> Iterator[None]:
    """No daemon runs within the block."""
    _end(node, number)
    try:
        yield
    finally:
        _start(node)


@contextmanager
def _cut_off(way: Gateway, docker_config: Path) -> Iterator[None]:
    """There are no registry and no credentials within the block."""
    away = docker_config.rename(docker_config.with_suffix(".away"))
    try:
        with way.closed():
            yield
    finally:
        away.rename(docker_config)


def _stop(here: Instance, process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    _must_have_ended_well(here, process.wait(WAIT_SECONDS))
    assert here.mounts() == []


def _must_have_ended_well(here: Instance, status: int) -> None:
    assert status == 0
    assert not (here.state / "firstbyte-control.sock").exists()


def _wait_for(here: Instance) -> None:
    """Until the daemon answers: the sockets of one that was killed are still there."""

    def answers() -> bool:
        with SnapshotsClient(_socket(here)) as client, suppress(grpc.RpcError):
            client.list()
            return True
        return False

    wait_until(answers)


def _socket(here: Instance) -> Path:
    return here.state / "firstbyte.sock"


# --- what containerd and its users see ---


def _fails(call: Callable[[], object]) -> None:
    """When the daemon ends during a call, and as whoever calls may try again."""
    with pytest.raises(grpc.RpcError) as raised:
        call()
    assert raised.value.code() is grpc.StatusCode.UNAVAILABLE, raised.value.details()


def _while_it_is_absent(node: LazyNode, number: signal.Signals, call: Callable[[], object]) -> None:
    """A call waits for the next daemon, or fails as whoever calls may try again."""
    with ThreadPoolExecutor(1) as thread:
        _end(node, number)
        calling = thread.submit(call)
        time.sleep(0.2)
        _start(node)
        error = calling.exception()
        if error is not None:
            assert isinstance(error, grpc.RpcError)
            assert error.code() is grpc.StatusCode.UNAVAILABLE, error.details()


def _try(call: Callable[[], object]) -> None:
    with suppress(grpc.RpcError):
        call()


def _once_it_is_back(call: Callable[[], T]) -> T:
    """The same call, until it works: containerd dials again only after a while."""
    deadline = time.monotonic() + WAIT_SECONDS
    while True:
        try:
            return call()
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.UNAVAILABLE or time.monotonic() > deadline:
                raise
        time.sleep(POLL_SECONDS)


def _must_be_consistent(client: SnapshotsClient) -> None:
    infos = client.list()
    names = {info.name for info in infos}
    assert len(names) == len(infos)
    assert {info.parent for info in infos} <= names | {""}
    for info in infos:
        try:
            assert client.stat(info.name) == info
            client.usage(info.name)
        except grpc.RpcError as error:  # containerd may collect its garbage meanwhile
            there = info.name in {one.name for one in client.list()}
            if there or error.code() is not grpc.StatusCode.NOT_FOUND:
                raise


def _must_be_right(client: SnapshotsClient, images: Sequence[SharingImage]) -> None:
    """Every file of images that were pulled."""
    for image in images:
        (mount,) = client.view("checked", _top(client, image))
        for path, digest in image.files.items():
            assert _digest_of(Path(mount.source), path) == digest
        client.remove("checked")


def _top(client: SnapshotsClient, image: SharingImage) -> str:
    """The snapshot of all of an image: the one of it that no layer is above."""
    infos = client.list()
    parents = {info.parent for info in infos}
    (top,) = (
        info.name
        for info in infos
        if info.labels.get(IMAGE) == image.digest and info.name not in parents
    )
    return top


def _digest_of(root: Path, path: str) -> str:
    return hashlib.sha256((root / path.removeprefix("/")).read_bytes()).hexdigest()
