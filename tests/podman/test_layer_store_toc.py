"""The additional layer store for podman 5.1 and later, which asks by tables of contents."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.instance import Instance, firstbyte, instance
from tests.support.podman import Podman, Version, podman
from tests.support.registry import PASSWORD, USERNAME, docker_registry

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
    forget_pulled(new)
    here.succeed("daemon", "--stop")
    for process in here.started:
        process.wait(timeout=30)
    new.configure()


def forget_pulled(new: Podman) -> None:
    new.reset()
    for diff in (new.graph_root / "overlay").glob("*/diff"):
        if diff.is_symlink():  # of layers that podman has forgotten
            shutil.rmtree(diff.parent)


@pytest.fixture(scope="module")
def private(new: Podman, app: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The image in a registry with a password."""
    with docker_registry(tmp_path_factory.mktemp("private"), password=True) as registry:
        reference = registry.reference("team/private")
        let_podman(new, registry.host)
        new.succeed("pull", "-q", app)
        push = ("push", "-q", "--compression-format=zstd:chunked", "--force-compression")
        new.succeed(*push, f"--creds={USERNAME}:{PASSWORD}", app, reference)
        new.reset()
        yield reference


def let_podman(new: Podman, host: str, helper: Path | None = None) -> None:
    """Use another registry, too, and hand credentials to a program."""
    path = new.base / "registries.conf"
    _, table, text = path.read_text().partition("[[registry]]")
    more = f'[[registry]]\nlocation = "{host}"\ninsecure = true\n'
    named = f'additional-layer-store-auth-helper = "{helper}"\n' if helper else ""
    path.write_text(named + table + text.replace(more, "") + more)


def helper_for(here: Instance) -> Path:
    """The program of this instance, which podman can run in its own root."""
    path = here.base / "programs/helper"
    program = Path(sys.executable).with_name("firstbyte-podman-credentials")
    places = f"--root {here.root} --state {here.state}"
    path.write_text(f"#!/bin/sh\nexec chroot /proc/{os.getpid()}/root {program} {places}\n")
    path.chmod(0o755)
    return path


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
    new.succeed("run", "-d", "--name", "one", chunked, "/bin/sleep", "infinity")
    assert from_the_store(new) == 3
    seen = new.succeed("exec", "one", "/bin/sh", "-c", "cat /etc/name; ls /srv")
    assert seen.split() == ["third", "big"]


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


def test_credentials_of_one_command_do_for_its_layers(
    new: Podman, private: str, served: Instance
) -> None:
    """Nobody is logged in; what is handed over is forgotten with the daemon, and never on disk."""
    host, creds = private.partition("/")[0], f"--creds={USERNAME}:{PASSWORD}"
    start_beside(served, "5.2.0")
    new.succeed("pull", "-q", creds, private)
    assert from_the_store(new) == 0
    new.succeed("rmi", private)
    let_podman(new, host, helper_for(served))
    new.succeed("pull", "-q", creds, private)
    assert from_the_store(new) == 3
    forget_pulled(new)
    assert PASSWORD not in served.log()
    for path in (*served.root.rglob("*"), *served.state.glob("*")):
        if path.is_file() and not path.is_relative_to(served.root / "podman/layers"):
            assert PASSWORD.encode() not in path.read_bytes(), path
    served.succeed("daemon", "--stop")
    start_beside(served, "5.2.0")
    let_podman(new, host)
    new.succeed("pull", "-q", creds, private)
    assert from_the_store(new) == 0


def test_a_pull_goes_on_when_credentials_cannot_be_handed_over(
    new: Podman, private: str, served: Instance
) -> None:
    """podman says so, and pulls."""
    let_podman(new, private.partition("/")[0], helper_for(served))
    done = new.run("pull", "-q", f"--creds={USERNAME}:{PASSWORD}", private)
    assert done.returncode == 0
    assert "additional-layer-store-auth-helper" in done.stderr
    assert from_the_store(new) == 0
