"""Real containerd, of two generations."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import pytest

from snapshotter.containerd.snapshotter import Snapshotter
from tests.support.conformance import SERVICES, Service, Session, running
from tests.support.containerd import RunningContainerd, Setup, Version, running_containerd
from tests.support.layouts import write_layout
from tests.support.lazy_images import DirectoryImages
from tests.support.lazy_node import LazyNode, lazy_node
from tests.support.registry import RunningRegistry, docker_registry, skopeo_push
from tests.support.rootfs import as_layer, make_rootfs
from tests.support.shop import Shop, shop
from tests.support.spoken import SOON

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator
    from contextlib import AbstractContextManager
    from pathlib import Path


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Function,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A failed test shows the logs of the containerds that it used."""
    report = yield
    if report.failed:
        for value in item.funcargs.values():
            if isinstance(value, RunningContainerd):
                report.sections.append((f"log of containerd {value.version}", value.log()))
            if isinstance(value, LazyNode):
                report.sections.append(
                    (f"log of {value.containerd.version}", value.containerd.log())
                )
    return report


@pytest.fixture(scope="session")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningRegistry]:
    with docker_registry(tmp_path_factory.mktemp("registry")) as running:
        yield running


@pytest.fixture(scope="session")
def shell_image(registry: RunningRegistry, tmp_path_factory: pytest.TempPathFactory) -> str:
    """An image in the registry with a shell and a few tools, which sleeps if not told otherwise."""
    directory = tmp_path_factory.mktemp("shell")
    root = make_rootfs(directory / "root")
    config = {"config": {"Cmd": ["/bin/sleep", "infinity"], "Env": ["PATH=/bin"]}}
    write_layout(directory / "layout", [as_layer(root)], config=config)
    reference = registry.reference("shell")
    skopeo_push(directory / "layout", reference)
    return reference


@pytest.fixture(scope="session")
def run_containerd(shell_image: str) -> Callable[..., AbstractContextManager[RunningContainerd]]:
    """`running_containerd` with the shell image for sandboxes; takes the fields of `Setup`."""

    def run(
        version: Version, *, binds: tuple[Path, ...] = (), **fields: object
    ) -> AbstractContextManager[RunningContainerd]:
        setup = Setup(sandbox_image=shell_image, **fields)  # type: ignore[arg-type]
        return running_containerd(version, setup, binds=binds)

    return run


@pytest.fixture(scope="module")
def containerd16(
    run_containerd: Callable[..., AbstractContextManager[RunningContainerd]],
) -> Iterator[RunningContainerd]:
    """containerd 1.6 with its own overlayfs snapshotter."""
    with run_containerd("1.6") as running:
        yield running


@pytest.fixture(scope="module")
def containerd21(
    run_containerd: Callable[..., AbstractContextManager[RunningContainerd]],
) -> Iterator[RunningContainerd]:
    """containerd 2.1 with its own overlayfs snapshotter."""
    with run_containerd("2.1") as running:
        yield running


@pytest.fixture(scope="module")
def lazy_node16(
    run_containerd: Callable[..., AbstractContextManager[RunningContainerd]],
) -> Iterator[LazyNode]:
    """containerd 1.6 with our snapshotter."""
    with lazy_node(run_containerd, "1.6") as running:
        yield running


@pytest.fixture(scope="module")
def lazy_node21(
    run_containerd: Callable[..., AbstractContextManager[RunningContainerd]],
) -> Iterator[LazyNode]:
    """containerd 2.1 with our snapshotter."""
    with lazy_node(run_containerd, "2.1") as running:
        yield running


@pytest.fixture(scope="module", params=["1.6", "2.1"])
def any_lazy_node(request: pytest.FixtureRequest) -> LazyNode:
    """Each of them."""
    name = {"1.6": "lazy_node16", "2.1": "lazy_node21"}[request.param]
    found: LazyNode = request.getfixturevalue(name)
    return found


@pytest.fixture(scope="module", params=["1.6", "2.1"])
def any_containerd(request: pytest.FixtureRequest) -> RunningContainerd:
    """Each of them."""
    name = {"1.6": "containerd16", "2.1": "containerd21"}[request.param]
    found: RunningContainerd = request.getfixturevalue(name)
    return found


@pytest.fixture
def images(tmp_path: Path) -> DirectoryImages:
    """What a snapshotter of this process serves lazily."""
    return DirectoryImages(tmp_path / "images")


@pytest.fixture
def snapshotter(tmp_path: Path, images: DirectoryImages) -> Iterator[Snapshotter]:
    """A snapshotter without a containerd."""
    snapshotter = Snapshotter(tmp_path / "root", images, tmp_path / "idmapped")
    yield snapshotter
    snapshotter.close()


@pytest.fixture
def directories(tmp_path: Path) -> Path:
    """Where it keeps what is not lazy."""
    return tmp_path / "root" / "containerd" / "snapshots"


@pytest.fixture
def no_thread_is_left() -> Iterator[None]:
    """What a test has started in this process ends with it."""
    before = set(threading.enumerate())
    yield
    for thread in set(threading.enumerate()) - before:
        if not thread.name.startswith("Trio thread"):  # trio keeps these for ten seconds
            thread.join(SOON)
            assert not thread.is_alive(), thread


@pytest.fixture
def address(tmp_path: Path) -> Path:
    """Where a server is to listen."""
    return tmp_path / "containerd.sock"


@pytest.fixture(scope="module")
def store() -> Iterator[Shop]:
    """A registry with images, for all tests of a module."""
    with shop() as made:
        yield made


@pytest.fixture(scope="module", params=SERVICES)
def service(request: pytest.FixtureRequest) -> Iterator[Service]:
    """Each snapshotter behind a socket: FirstByte, and what it is to be like."""
    with running(request.param) as made:
        yield made


@pytest.fixture
def session(service: Service, tmp_path: Path) -> Iterator[Session]:
    """What one test does with a service."""
    with service.session(tmp_path) as made:
        yield made
