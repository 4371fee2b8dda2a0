"""`firstbyte podman add`: podman runs, builds upon and lists images that nobody has pulled."""

from __future__ import annotations

import json
import os
import signal
import tarfile
from typing import TYPE_CHECKING

import pytest

from snapshotter.podman.graph_root import GraphRoot
from tests.support.instance import Instance, greeter, wait_until
from tests.support.layouts import write_layout
from tests.support.registry import skopeo_push
from tests.support.tars import file, tar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.support.podman import Podman
    from tests.support.registry import RunningRegistry

pytestmark = pytest.mark.root


@pytest.fixture(autouse=True)
def nothing_stays(here: Instance, any_podman: Podman) -> Iterator[None]:
    """And a daemon runs as a service does, which none has to wait for."""
    if not greeter(here.state):
        here.start()
    yield
    any_podman.reset()
    for image in GraphRoot(here.root / "podman/images").images():
        here.succeed("podman", "rm", image.id)


def listed(here: Instance) -> list[dict[str, object]]:
    found: list[dict[str, object]] = json.loads(here.succeed("podman", "ls", "--json"))
    return found


def test_an_image_runs_that_nobody_pulled(here: Instance, any_podman: Podman, app: str) -> None:
    assert here.succeed("podman", "add", app).startswith(f"podman can run {app} (")
    assert any_podman.succeed("run", "--rm", app) == "third"
    assert any_podman.images()[app]["ReadOnly"]
    assert any_podman.succeed("run", "--rm", app, "/bin/ls", "/srv") == "big"
    (image,) = listed(here)
    assert image["names"] == [app]
    found = json.loads(any_podman.succeed("image", "inspect", app))[0]
    assert found["Id"] == image["id"]
    assert found["Config"]["Cmd"] == ["/bin/sh", "-c", "cat /etc/name"]
    by_digest = f"{app.rpartition(':')[0]}@{image['digest']}"
    assert any_podman.succeed("run", "--rm", "--pull=never", by_digest) == "third"


def test_a_container_is_used_as_any(here: Instance, any_podman: Podman, app: str) -> None:
    here.succeed("podman", "add", app)
    any_podman.succeed("run", "-d", "--name", "one", app, "/bin/sleep", "infinity")
    assert any_podman.succeed("exec", "one", "/bin/cat", "/etc/name") == "third"
    any_podman.succeed("exec", "one", "/bin/sh", "-c", "echo written > /etc/name")
    any_podman.succeed("restart", "-t", "0", "one")
    assert any_podman.succeed("exec", "one", "/bin/cat", "/etc/name") == "written"
    any_podman.succeed("commit", "-q", "one", "localhost/committed:1")
    assert any_podman.succeed("run", "--rm", "localhost/committed:1", "/bin/cat", "/etc/name") == (
        "written"
    )


def test_an_image_is_built_upon_it(here: Instance, any_podman: Podman, app: str) -> None:
    here.succeed("podman", "add", app)
    folder = any_podman.base / "context"
    folder.mkdir()
    (folder / "Dockerfile").write_text(f"FROM {app}\nRUN ls /srv > /etc/name\n")
    any_podman.succeed("build", "-q", "-t", "localhost/built:1", folder)
    assert any_podman.succeed("run", "--rm", "localhost/built:1") == "big"
    assert "is in use by image localhost/built:1" in here.fail("podman", "rm", app)


def test_it_cannot_be_removed_while_containers_are_made_of_it(
    here: Instance, any_podman: Podman, app: str
) -> None:
    here.succeed("podman", "add", app)
    any_podman.succeed("run", "-d", "--name", "runs", app, "/bin/sleep", "infinity")
    assert "is in use by container runs" in here.fail("podman", "rm", app)
    assert any_podman.succeed("exec", "runs", "/bin/cat", "/etc/name") == "third"
    any_podman.succeed("stop", "-t", "0", "runs")
    assert "is in use by container runs" in here.fail("podman", "rm", app)
    any_podman.succeed("rm", "runs")
    here.succeed("podman", "rm", app)
    assert listed(here) == []
    assert app not in any_podman.images()


def test_podman_removes_only_what_is_its_own(
    here: Instance, any_podman: Podman, app: str, other: str
) -> None:
    """With its own layers or without, used by a container or not."""
    here.succeed("podman", "add", app)
    here.succeed("podman", "add", "--layers", other)
    stops_at_once = ("-d", "--stop-timeout=0")
    any_podman.succeed("run", *stops_at_once, "--name", "one", other, "/bin/sleep", "infinity")
    for image in (app, other):
        assert "read-only" in any_podman.fail("rmi", image)
    any_podman.succeed("system", "prune", "-af")
    assert any_podman.succeed("exec", "one", "/bin/cat", "/etc/name") == "of the other"
    assert "read-only" in any_podman.fail("rmi", "-f", other)
    assert any_podman.succeed("exec", "one", "/bin/cat", "/etc/name") == "of the other"
    any_podman.succeed("rm", "-f", "one")
    assert any_podman.succeed("run", "--rm", "--pull=never", app) == "third"
    assert any_podman.succeed("run", "--rm", "--pull=never", other) == "of the other"
    here.succeed("podman", "rm", app, other)
    assert any_podman.images() == {}


def test_neither_a_repair_nor_a_reset_does_anything_to_it(
    here: Instance, any_podman: Podman, app: str, other: str
) -> None:
    """podman finds fault with an image whose layers are merged, as the digest of its layer is that
    of no tar; what is built on it goes in a repair. (To 5.4 all layers of other stores are
    missing.) In a reset all of podman's own graph root goes.
    """
    here.succeed("podman", "add", app)
    here.succeed("podman", "add", "--layers", other)
    stops_at_once = ("-d", "--stop-timeout=0")
    any_podman.succeed("run", *stops_at_once, "--name", "one", app, "/bin/sleep", "infinity")
    any_podman.succeed("run", *stops_at_once, "--name", "two", other, "/bin/sleep", "infinity")
    any_podman.succeed("commit", "-q", "one", "localhost/committed:1")
    any_podman.succeed("commit", "-q", "two", "localhost/committed:2")
    finds = any_podman.fail("system", "check", "--repair")
    own = {"4.3": (1, 2), "5.4": (), "5.8": (2,)}[any_podman.version]
    left = [*(f"localhost/committed:{number}" for number in own), app, other]
    assert sorted(any_podman.images()) == sorted(left)
    assert ("unknown flag" in finds) is (any_podman.version == "4.3")
    assert any_podman.succeed("exec", "one", "/bin/cat", "/etc/name") == "third"
    assert any_podman.succeed("exec", "two", "/bin/cat", "/etc/name") == "of the other"
    any_podman.succeed("system", "reset", "-f")
    assert sorted(any_podman.images()) == sorted((app, other))
    for image, name in ((app, "third"), (other, "of the other")):
        assert any_podman.succeed("run", "--rm", "--pull=never", image) == name
        here.succeed("podman", "rm", image)


def test_the_ordinary_image_can_be_pulled_beside_it(
    here: Instance, any_podman: Podman, app: str
) -> None:
    here.succeed("podman", "add", app)
    any_podman.succeed("pull", "-q", app)
    assert any_podman.succeed("run", "--rm", app) == "third"
    any_podman.succeed("rmi", app)
    assert any_podman.succeed("run", "--rm", "--pull=never", app) == "third"


def test_what_can_be_pushed_and_saved(
    here: Instance, any_podman: Podman, app: str, registry: RunningRegistry
) -> None:
    """Neither the image nor what is built on it, as nobody knows the digest of its layer's tar; but
    what podman makes a tar of by itself first, and the image when it was pulled beside it."""
    here.succeed("podman", "add", app)
    copy = registry.reference(f"elsewhere/{any_podman.version}")
    saved = ("save", "-q", "-o", any_podman.base / "saved.tar")
    assert "Digest did not match" in any_podman.fail("push", "-q", app, copy)
    assert "Digest did not match" in any_podman.fail(*saved, app)
    (any_podman.base / "saved.tar").unlink(missing_ok=True)
    any_podman.succeed("create", "--name", "one", app)
    any_podman.succeed("commit", "-q", "one", "localhost/committed:1")
    assert "Digest did not match" in any_podman.fail("push", "-q", "localhost/committed:1", copy)
    any_podman.succeed("export", "-o", any_podman.base / "exported.tar", "one")
    with tarfile.open(any_podman.base / "exported.tar") as exported:
        assert exported.getmember("srv/big").size == 3_000_000
    folder = any_podman.base / "squashed"
    folder.mkdir()
    (folder / "Dockerfile").write_text(f"FROM {app}\nRUN ls /srv > /etc/name\n")
    any_podman.succeed("build", "-q", "--squash-all", "-t", "localhost/squashed:1", folder)
    any_podman.succeed("push", "-q", "localhost/squashed:1", copy)
    any_podman.succeed(*saved, "localhost/squashed:1")
    any_podman.reset()
    assert any_podman.succeed("run", "--rm", copy) == "big"
    any_podman.succeed("pull", "-q", app)
    any_podman.succeed("push", "-q", app, copy)


def test_an_image_with_its_own_layers_is_pushed_and_saved(
    here: Instance, any_podman: Podman, app: str, registry: RunningRegistry
) -> None:
    """And what is built on it; to podman it is the image that `podman pull` gives."""
    here.succeed("podman", "add", "--layers", app)
    looks = ("/bin/ls", "/srv", "/opt")
    seen = any_podman.succeed("run", "--rm", app, *looks).split()
    assert seen == ["/opt:", "new", "/srv:", "big"]
    here.succeed("daemon", "--stop")
    wait_until(lambda: not greeter(here.state))
    here.start()
    assert any_podman.succeed("run", "--rm", app, *looks).split() == seen
    any_podman.succeed("run", "-d", "--name", "one", app, "/bin/sleep", "infinity")
    copies = [registry.reference(f"{kind}/{any_podman.version}") for kind in ("copy", "committed")]
    any_podman.succeed("push", "-q", app, copies[0])
    any_podman.succeed("commit", "-q", "one", copies[1])
    any_podman.succeed("push", "-q", copies[1])
    saved = any_podman.base / "layers.tar"
    any_podman.succeed("save", "-q", "-o", saved, app)
    os.kill(greeter(here.state), signal.SIGKILL)
    here.start()
    any_podman.succeed("restart", "-t", "0", "one")
    assert any_podman.succeed("exec", "one", "/bin/cat", "/etc/name") == "third"
    (image,) = listed(here)
    assert image["mode"] == "fuse"
    refusal = here.fail("podman", "rm", app)
    assert "container one" in refusal
    assert f"image {copies[1]}" in refusal
    any_podman.reset()
    if any_podman.version == "5.8":
        any_podman.succeed("system", "check")
    any_podman.succeed("pull", "-q", app)
    assert any_podman.images()[app]["Id"] == image["id"]
    assert f"in use by image {app}" in here.fail("podman", "rm", app)
    any_podman.succeed("rmi", app)
    here.succeed("podman", "rm", app)
    any_podman.succeed("load", "-q", "-i", saved)
    assert any_podman.images()[app]["Id"] == image["id"]
    committed = any_podman.succeed("run", "--rm", copies[1], "/bin/cat", "/etc/name")
    assert committed == "third"


def test_images_with_their_own_layers_share_them(
    here: Instance,
    any_podman: Podman,
    app: str,
    other: str,
    registry: RunningRegistry,
) -> None:
    """What one has alone goes with it; podman builds upon them, and prunes what it has built."""
    for reference in (app, other):
        here.succeed("podman", "add", "--layers", reference)
    folder = any_podman.base / "upon-layers"
    folder.mkdir()
    (folder / "Dockerfile").write_text(f"FROM {app}\nRUN ls /srv > /etc/name\n")
    built = registry.reference(f"built/{any_podman.version}")
    any_podman.succeed("build", "-q", "-t", built, folder)
    any_podman.succeed("push", "-q", built)
    assert f"is in use by image {built}" in here.fail("podman", "rm", app)
    any_podman.succeed("system", "prune", "-af")
    assert sorted(any_podman.images()) == sorted((app, other))
    here.succeed("podman", "rm", app)
    assert any_podman.succeed("run", "--rm", other) == "of the other"
    assert any_podman.succeed("run", "--rm", built) == "big"


def test_layers_are_not_shown_where_podman_could_not_push_or_mount_them(
    here: Instance, registry: RunningRegistry, tmp_path: Path
) -> None:
    """There are none, or one is there twice, which overlayfs refuses."""
    write_layout(tmp_path / "layout", [])
    skopeo_push(tmp_path / "layout", registry.reference("empty"))
    write_layout(tmp_path / "twice", [tar(file(b"one", b"1")), tar(), tar()])
    skopeo_push(tmp_path / "twice", registry.reference("twice"))
    names = [registry.reference(name) for name in ("empty", "twice")]
    for reference in (f"oci:{tmp_path}/layout", *names):
        assert "add it without --layers" in here.fail("podman", "add", "--layers", reference)
    assert listed(here) == []


def test_images_that_share_layers_are_served_by_themselves(
    here: Instance, any_podman: Podman, app: str, other: str
) -> None:
    """podman knows nothing of what they share; one that goes takes nothing from the other."""
    here.succeed("podman", "add", app)
    here.succeed("podman", "add", other)
    any_podman.succeed("run", "-d", "--name", "one", app, "/bin/sleep", "infinity")
    here.succeed("podman", "rm", other)
    assert any_podman.succeed("exec", "one", "/bin/ls", "/srv") == "big"
    here.succeed("podman", "add", other)
    any_podman.succeed("rm", "-f", "-t", "0", "one")
    here.succeed("podman", "rm", app)
    assert any_podman.succeed("run", "--rm", other) == "of the other"


def test_a_tag_that_has_moved_is_followed(
    here: Instance, any_podman: Podman, make_image: Callable[..., str]
) -> None:
    moving = make_image("moving", tar(file(b"etc/name", b"old\n")))
    here.succeed("podman", "add", moving)
    any_podman.succeed("run", "-d", "--name", "old", moving, "/bin/sleep", "infinity")
    make_image("moving", tar(file(b"etc/name", b"new\n")))
    here.succeed("podman", "add", moving)
    assert any_podman.succeed("run", "--rm", moving) == "new"
    assert any_podman.succeed("exec", "old", "/bin/cat", "/etc/name") == "old"
    any_podman.succeed("rm", "-f", "-t", "0", "old")
    here.succeed("podman", "add", moving)
    assert [image["names"] for image in listed(here)] == [[moving]]


def test_it_outlives_the_daemon(here: Instance, any_podman: Podman, app: str) -> None:
    """Killed: what runs goes on. Stopped, as a reboot does it: the next daemon serves it again."""
    here.succeed("podman", "add", app)
    any_podman.succeed("run", "-d", "--name", "lives", app, "/bin/sleep", "infinity")
    with any_podman.start("run", "--rm", app) as starting:
        os.kill(greeter(here.state), signal.SIGKILL)
        daemon = here.start()
        assert starting.communicate(timeout=60)[0] == "third\n"
    assert any_podman.succeed("exec", "lives", "/bin/ls", "/srv") == "big"
    any_podman.succeed("rm", "-f", "-t", "0", "lives")
    here.succeed("daemon", "--stop")
    daemon.wait(timeout=30)
    assert app in any_podman.images()
    (image,) = listed(here)
    assert image["state"] == "unserved"
    daemon = here.start()
    assert any_podman.succeed("run", "--rm", app) == "third"
    wait_until(lambda: listed(here)[0]["mode"] == "native")
    assert any_podman.succeed("run", "--rm", app) == "third"
    here.succeed("podman", "rm", app)
    here.succeed("daemon", "--stop")
    daemon.wait(timeout=30)
