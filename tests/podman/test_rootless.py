"""podman without root: the daemon runs as the user, in the namespaces of the user's podman."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from typing import TYPE_CHECKING

import pytest

from snapshotter.podman.graph_root import GraphRoot
from tests.support.registry import PASSWORD, USERNAME, docker_registry
from tests.support.rootless import Somebody, give_to_somebody, somebody

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.support.registry import RunningRegistry

pytestmark = pytest.mark.root

CREDENTIALS = f"{USERNAME}:{PASSWORD}"


@pytest.fixture(scope="module")
def user(registry: RunningRegistry) -> Iterator[Somebody]:
    with somebody(registry.host) as made:
        made.start()  # which makes podman's namespaces
        yield made


@pytest.fixture(autouse=True)
def nothing_stays(user: Somebody) -> Iterator[None]:
    yield
    user.podman.reset()
    for image in GraphRoot(user.root / "podman/images").images():
        user.succeed("podman", "rm", image.id)


def counts(user: Somebody) -> list[list[int]]:
    held = json.loads((user.root / "podman/layers.json").read_bytes())
    return [image["counts"] for image in held["images"]]


def unpulled(user: Somebody) -> int:
    """How many layers podman has not stored itself."""
    layers = (user.podman.graph_root / "overlay").iterdir()
    return sum((layer / "diff").is_symlink() for layer in layers)


def test_a_user_runs_what_nobody_pulled(user: Somebody, app: str) -> None:
    assert user.succeed("podman", "add", app).startswith(f"podman can run {app} (")
    run, podman = ("run", "-d", "--name", "one", app, "/bin/sleep", "infinity"), user.podman
    podman.succeed(*run)
    assert podman.images()[app]["ReadOnly"]
    assert podman.succeed("exec", "one", "/bin/cat", "/etc/name") == "third"
    podman.succeed("exec", "one", "/bin/sh", "-c", "echo written > /etc/name")
    podman.succeed("commit", "-q", "one", "localhost/committed:1")
    assert podman.succeed("run", "--rm", "localhost/committed:1", "/bin/cat", "/etc/name") == (
        "written"
    )
    refusal = user.fail("podman", "rm", app)
    assert "container one" in refusal
    assert "image localhost/committed:1" in refusal
    assert "the mount" not in refusal
    podman.reset()
    user.succeed("podman", "rm", app)
    assert app not in podman.images()


def test_containers_outlive_the_daemon(user: Somebody, app: str) -> None:
    user.succeed("podman", "add", app)
    user.podman.succeed("run", "-d", "--name", "lives", app, "/bin/sleep", "infinity")
    os.kill(user.daemon, signal.SIGKILL)
    with user.podman.start("exec", "lives", "/bin/ls", "/srv") as waiting:
        user.start()
        assert waiting.communicate(timeout=60)[0] == "big\n"
    assert user.podman.succeed("run", "--rm", app) == "third"


def test_a_pull_downloads_no_layer(user: Somebody, app: str) -> None:
    """And overlayfs heeds what its layers hide, by attributes that a user may set."""
    user.podman.succeed("pull", "-q", app)
    assert unpulled(user) == 3
    assert counts(user) == [[1, 1, 1]]
    assert user.podman.succeed("run", "--rm", app, "/bin/ls", "/srv", "/opt").split() == [
        *("/opt:", "new"),
        *("/srv:", "big"),
    ]
    user.podman.succeed("rmi", app)
    assert counts(user) == [[0, 0, 0]]


def test_an_image_with_its_own_layers_is_pushed(
    user: Somebody, app: str, registry: RunningRegistry
) -> None:
    user.succeed("podman", "add", "--layers", app)
    looks = ("/bin/ls", "/srv", "/opt")
    seen = user.podman.succeed("run", "--name", "one", app, *looks)
    assert seen.split() == ["/opt:", "new", "/srv:", "big"]
    committed = registry.reference("elsewhere/by-a-user")
    user.podman.succeed("commit", "-q", "one", committed)
    user.podman.succeed("push", "-q", committed)
    user.podman.reset()
    assert user.podman.succeed("run", "--rm", committed, *looks) == seen


def test_credentials_are_handed_to_the_users_daemon(
    user: Somebody, app: str, tmp_path: Path
) -> None:
    """By the program that podman runs where it works itself; it is told so by its environment."""
    with docker_registry(tmp_path, password=True) as registry:
        private = registry.reference("team/private")
        copy = ("--src-tls-verify=false", "--dest-tls-verify=false", f"--dest-creds={CREDENTIALS}")
        command = ["skopeo", "copy", "-q", *copy, f"docker://{app}", f"docker://{private}"]
        subprocess.run(command, check=True)
        assert "login required" in user.fail("podman", "add", private)
        handed = {private: {"username": USERNAME, "password": PASSWORD}}
        user.unshare("podman", "credentials", given=json.dumps(handed))
        user.succeed("podman", "add", private)
        assert user.podman.succeed("run", "--rm", private) == "third"


def test_mounts_are_for_podman_alone(user: Somebody, app: str) -> None:
    target = user.home / "tree"
    assert "podman unshare if the mount is for podman" in user.fail("mount", app, target)
    user.podman.succeed("unshare", "mkdir", target)
    assert user.unshare("mount", app, target).stdout.startswith("mounted ")
    rootfs = ("run", "--rm", "--rootfs", f"{target}:O", "/bin/cat", "/etc/name")
    assert user.podman.succeed(*rootfs) == "third"
    assert not (target / "etc").exists()
    user.unshare("umount", target)


def test_what_a_user_builds_saves_prunes_and_resets(
    user: Somebody, app: str, other: str, registry: RunningRegistry
) -> None:
    user.succeed("podman", "add", app)
    user.succeed("podman", "add", "--layers", other)
    folder, podman = user.home / "context", user.podman
    folder.mkdir()
    built = {app: "localhost/upon-app:1", other: registry.reference("elsewhere/upon-other")}
    for image, name in built.items():
        (folder / "Dockerfile").write_text(f"FROM {image}\nRUN ls /bin/cat > /etc/name\n")
        give_to_somebody(folder, *folder.iterdir())
        podman.succeed("build", "-q", "-t", name, folder)
        assert podman.succeed("run", "--rm", name, "/bin/cat", "/etc/name") == "/bin/cat"
        assert f"image {name}" in user.fail("podman", "rm", image)
    saved = ("save", "-q", "-o")
    for number, image in enumerate((app, built[app])):
        refusal = podman.fail(*saved, user.home / f"refused-{number}.tar", image)
        assert "Digest did not match" in refusal
    podman.succeed(*saved, user.home / "other.tar", other)
    podman.succeed(*saved, user.home / "upon-other.tar", built[other])
    podman.succeed("push", "-q", built[other])
    assert podman.succeed("image", "prune", "-af")
    assert sorted(podman.images()) == sorted((app, other))
    podman.succeed("load", "-q", "-i", user.home / "upon-other.tar")
    assert podman.succeed("run", "--rm", built[other], "/bin/cat", "/etc/name") == "/bin/cat"
    podman.succeed("system", "prune", "-af")
    for image, name in ((app, "third"), (other, "of the other")):
        assert podman.succeed("run", "--rm", "--pull=never", image) == name
        assert "read-only" in podman.fail("rmi", image)
    podman.succeed("create", "--name", "one", other)
    podman.settle()
    podman.succeed("system", "reset", "-f")
    for image in (app, other):  # in new namespaces, in which nothing is mounted
        assert "no such file or directory" in podman.fail("run", "--rm", "--pull=never", image)
    refusal = user.fail("podman", "add", app)
    assert "podman has a new namespace" in refusal
    assert "systemctl --user restart firstbyte" in refusal
    user.start("--replace")
    assert sorted(podman.images()) == sorted((app, other))
    for image, name in ((app, "third"), (other, "of the other")):
        assert podman.succeed("run", "--rm", "--pull=never", image) == name
    assert podman.succeed("run", "--rm", built[other], "/bin/cat", "/etc/name") == "/bin/cat"


def test_a_daemon_follows_podman_to_new_namespaces(user: Somebody, app: str) -> None:
    """As `podman system migrate` makes them. A daemon that none was started for will do."""
    user.podman.succeed("system", "migrate")
    found = user.run("doctor", "podman").stdout
    assert "podman has a new namespace, and does not see what the daemon mounts" in found
    daemon = user.start("--replace")
    found = user.succeed("doctor", "podman")
    assert "ok: rootless: podman has 65537 user IDs" in found
    assert "problem" not in found
    assert "warning" not in found
    daemon.send_signal(signal.SIGINT)
    daemon.wait(timeout=30)
    refusal = user.fail("podman", "add", "--layers", app)  # by a daemon that this has started
    assert "only a daemon that runs as a service" in refusal
    assert "systemctl --user start firstbyte" in refusal
    user.succeed("podman", "add", app)
    assert user.podman.succeed("run", "--rm", app) == "third"
