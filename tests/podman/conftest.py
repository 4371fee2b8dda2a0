"""A registry, an instance and podmans for all tests of a module."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.support.debian_root import shared
from tests.support.instance import Instance, firstbyte, instance
from tests.support.layouts import write_layout
from tests.support.podman import VERSIONS, Podman, Version, podman
from tests.support.registry import RunningRegistry, docker_registry, skopeo_push
from tests.support.rootfs import as_layer, make_rootfs
from tests.support.tars import directory, file, opaque, tar, whiteout

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@pytest.fixture(scope="session")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningRegistry]:
    with docker_registry(tmp_path_factory.mktemp("registry")) as running:
        yield running


@pytest.fixture(scope="module")
def served() -> Iterator[Instance]:
    """An instance whose daemon runs as a service does."""
    with instance() as made:
        made.start()
        yield made


@pytest.fixture(scope="session")
def rootfs(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A layer with a shell and a few tools."""
    return as_layer(make_rootfs(tmp_path_factory.mktemp("rootfs") / "root"))


@pytest.fixture(scope="session")
def make_image(
    registry: RunningRegistry, rootfs: bytes, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., str]:
    """Push an image of the tools and more layers, with a file index; returns its reference."""

    def make(name: str, *layers: bytes, **config: object) -> str:
        layout = tmp_path_factory.mktemp(name) / "layout"
        every = [rootfs, *layers]
        history = [{"created_by": f"layer {number}"} for number in range(len(every))]
        run = {"Cmd": ["/bin/sh", "-c", "cat /etc/name"], "Env": ["PATH=/bin"], **config}
        write_layout(layout, every, config={"config": run, "history": history})
        reference = registry.reference(name)
        skopeo_push(layout, reference)
        firstbyte("index", "build", reference, "--push")
        return reference

    return make


@pytest.fixture(scope="session")
def app(make_image: Callable[..., str]) -> str:
    """An image of three layers: what the second brings, the third replaces or deletes."""
    return make_image(
        "app",
        tar(
            *(directory(b"srv"), file(b"srv/gone", b"gone"), file(b"etc/name", b"second\n")),
            *(directory(b"opt"), file(b"opt/old", b"old")),
        ),
        tar(
            *(whiteout(b"srv/gone"), file(b"etc/name", b"third\n")),
            *(file(b"srv/big", b"b" * 3_000_000), opaque(b"opt"), file(b"opt/new", b"new")),
        ),
    )


@pytest.fixture(scope="session")
def other(make_image: Callable[..., str]) -> str:
    """An image that has its lowest layer in common with `app`."""
    return make_image("other", tar(file(b"etc/name", b"of the other\n")))


@pytest.fixture(scope="module")
def here() -> Iterator[Instance]:
    """All podmans see what its daemon mounts, one that runs before they enter their roots, too."""
    with instance() as made, shared(made.base):
        yield made
        made.clean()


@pytest.fixture(scope="module", params=VERSIONS)
def any_podman(
    request: pytest.FixtureRequest, here: Instance, registry: RunningRegistry
) -> Iterator[Podman]:
    """Each podman; it knows the image store of `here`, which its storage is part of."""
    version: Version = request.param
    with podman(version, here.base / f"p{version}", registry.host, [here.base]) as made:
        here.environment["CONTAINERS_STORAGE_CONF"] = str(made.base / "storage.conf")
        made.configure(additionalimagestores=[here.root / "podman" / "images"])
        yield made
        made.reset()
