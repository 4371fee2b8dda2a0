"""The additional layer store for podman 5.1 and later, which asks by tables of contents."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING

import pytest

from tests.support.instance import Instance, firstbyte, instance
from tests.support.podman import Podman, Version, podman

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.registry import RunningRegistry

pytestmark = pytest.mark.root


@pytest.fixture(scope="module", params=["5.4", "5.8"])
def new(request: pytest.FixtureRequest, registry: RunningRegistry) -> Iterator[Podman]:
    """podman 5.4 and 5.8, with no store but their own."""
    with instance() as here:
        version: Version = request.param
        with podman(version, here.base / f"p{version}", registry.host, [here.base]) as made:
            made.configure()
            yield made
            made.reset()


@pytest.fixture(scope="module")
def chunked(new: Podman, app: str, registry: RunningRegistry) -> str:
    """The image as this podman pushes it with tables of contents."""
    reference = registry.reference(f"chunked-{new.version}")
    new.succeed("pull", "-q", app)
    push = ("push", "-q", "--compression-format=zstd:chunked", "--force-compression")
    new.succeed(*push, app, reference)
    new.reset()
    firstbyte("index", "build", reference, "--push")
    return reference


@pytest.fixture
def served(new: Podman) -> Iterator[Instance]:
    """The instance that this podman's storage is in, with a daemon and a layer store."""
    here = Instance(new.base.parent)
    (here.base / "programs").mkdir(exist_ok=True)
    new.configure(additionallayerstores=[f"{here.root}/podman/layers:ref"])
    yield here
    new.reset()
    for diff in (new.graph_root / "overlay").glob("*/diff"):
        if diff.is_symlink():  # of layers that podman has forgotten
            shutil.rmtree(diff.parent)
    here.succeed("daemon", "--stop")
    for process in here.started:
        process.wait(timeout=30)
    new.configure()


def start_beside(here: Instance, version: str) -> None:
    """A daemon that finds a podman of this version on its node."""
    program = here.base / "programs/podman"
    program.write_text(f"#!/bin/sh\necho podman version {version}\n")
    program.chmod(0o755)
    here.environment["PATH"] = f"{program.parent}:{os.environ['PATH']}"
    here.start()


def from_the_store(new: Podman) -> int:
    return sum(diff.is_symlink() for diff in (new.graph_root / "overlay").glob("*/diff"))


def test_layers_are_found_by_their_tables(new: Podman, chunked: str, served: Instance) -> None:
    """In one command: that is what these versions can do, which forget layers between commands."""
    start_beside(served, "5.2.0")
    new.succeed("run", "--name", "one", chunked, "/bin/sh", "-c", "cat /etc/name; ls /srv")
    assert from_the_store(new) == 3
    assert new.succeed("logs", "one").split() == ["third", "big"]


def test_who_would_forget_layers_gets_none(new: Podman, chunked: str, served: Instance) -> None:
    start_beside(served, f"{new.version}.0")
    new.succeed("pull", "-q", chunked)
    assert from_the_store(new) == 0
    assert new.succeed("run", "--rm", "--pull=never", chunked) == "third"
    assert "would forget the layers" in served.log()


def test_an_image_without_tables_is_pulled_as_ever(new: Podman, app: str, served: Instance) -> None:
    start_beside(served, "5.2.0")
    new.succeed("pull", "-q", app)
    assert from_the_store(new) == 0
    assert new.succeed("run", "--rm", "--pull=never", app) == "third"
