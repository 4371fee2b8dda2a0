"""The additional layer store: podman pulls an image, and downloads none of its layers."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

from tests.support.instance import Instance, greeter, wait_until
from tests.support.podman import Podman, podman
from tests.support.tars import file, tar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.support.registry import RunningRegistry

pytestmark = pytest.mark.root

KILLS = int(os.environ.get("FIRSTBYTE_PODMAN_KILLS", "2"))
"""How often the daemon is killed while podman does each thing; 1 s each."""


@pytest.fixture(scope="module")
def old(served: Instance, registry: RunningRegistry) -> Iterator[Podman]:
    """podman 4.3, which asks for layers by their digests."""
    with podman("4.3", served.base / "p4", registry.host, [served.base]) as made:
        made.configure(additionallayerstores=[f"{served.root}/podman/layers:ref"])
        yield made
        made.reset()


@pytest.fixture(autouse=True)
def nothing_stays(old: Podman) -> Iterator[None]:
    yield
    old.reset()


def counts(served: Instance) -> dict[str, list[int]]:
    """How often each layer is used, by reference."""
    held = json.loads((served.root / "podman/layers.json").read_bytes())
    return {image["reference"]: image["counts"] for image in held["images"]}


def unpulled(old: Podman) -> int:
    """How many layers podman has not stored itself."""
    return sum(diff.is_symlink() for diff in (old.graph_root / "overlay").glob("*/diff"))


def test_a_pull_downloads_no_layer(served: Instance, old: Podman, app: str) -> None:
    old.succeed("pull", "-q", app)
    assert unpulled(old) == 3
    assert counts(served)[app] == [1, 1, 1]
    assert old.succeed("run", "--rm", app) == "third"
    assert old.succeed("run", "--rm", app, "/bin/ls", "/srv") == "big"
    old.succeed("rmi", app)
    assert counts(served)[app] == [0, 0, 0]


def test_what_was_pulled_is_pushed_and_saved_as_it_came(
    served: Instance, old: Podman, app: str, registry: RunningRegistry
) -> None:
    """podman unpacks the registry's blobs for that, and packs them in its own way."""
    old.succeed("pull", "-q", app)
    copy = registry.reference("elsewhere/copy")
    old.succeed("push", "-q", app, copy)
    assert diff_ids_of(copy) == diff_ids_of(app)
    saved = old.base / "saved"
    old.succeed("save", "-q", "--format", "oci-dir", "-o", saved, app)
    layers = {hashlib.sha256(gunzip(path)).hexdigest() for path in blobs_of(saved)}
    assert layers >= {diff_id.removeprefix("sha256:") for diff_id in diff_ids_of(app)}
    old.reset()
    assert old.succeed("run", "--rm", copy) == "third"


def diff_ids_of(reference: str) -> list[str]:
    command = ["skopeo", "inspect", "--config", "--tls-verify=false", f"docker://{reference}"]
    done = subprocess.run(command, check=True, capture_output=True)
    diff_ids: list[str] = json.loads(done.stdout)["rootfs"]["diff_ids"]
    return diff_ids


def blobs_of(layout: Path) -> list[Path]:
    return list((layout / "blobs/sha256").iterdir())


def gunzip(path: Path) -> bytes:
    data = path.read_bytes()
    return gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data


def test_images_are_made_of_it_and_pushed(
    served: Instance, old: Podman, app: str, registry: RunningRegistry
) -> None:
    old.succeed("run", "--name", "one", app, "/bin/sh", "-c", "echo written > /etc/name")
    committed = registry.reference("elsewhere/committed")
    old.succeed("commit", "-q", "one", committed)
    folder = old.base / "context"
    folder.mkdir()
    (folder / "Dockerfile").write_text(f"FROM {app}\nRUN ls /srv > /etc/name\n")
    built = registry.reference("elsewhere/built")
    old.succeed("build", "-q", "-t", built, folder)
    for made in (committed, built):
        old.succeed("push", "-q", made)
    old.reset()
    assert counts(served)[app] == [0, 0, 0]
    assert old.succeed("run", "--rm", committed, "/bin/cat", "/etc/name") == "written"
    assert old.succeed("run", "--rm", built) == "big"


def test_images_that_share_layers(served: Instance, old: Podman, app: str, other: str) -> None:
    """podman has a layer once, from where it found it first; it goes with the last image."""
    old.succeed("pull", "-q", app)
    old.succeed("pull", "-q", other)
    assert unpulled(old) == 4
    old.succeed("rmi", app)
    assert old.succeed("run", "--rm", "--pull=never", other) == "of the other"
    assert counts(served)[app] == [1, 0, 0]
    old.succeed("rmi", other)
    assert counts(served)[app] == [0, 0, 0]
    assert not any(counts(served)[other])


def test_a_layer_that_an_image_has_twice_is_podmans(
    served: Instance, old: Podman, make_image: Callable[..., str]
) -> None:
    twice = make_image("twice", tar(file(b"etc/name", b"of two")), tar(), tar())
    old.succeed("pull", "-q", twice)
    assert unpulled(old) == 2
    assert old.succeed("run", "--rm", twice) == "of two"
    old.succeed("rmi", twice)
    assert not any(counts(served)[twice])


def test_an_image_stays_while_a_container_uses_it(served: Instance, old: Podman, app: str) -> None:
    stops_at_once = ("-d", "--stop-timeout=0")
    old.succeed("run", *stops_at_once, "--name", "runs", app, "/bin/sleep", "infinity")
    assert "in use" in old.fail("rmi", app)
    old.succeed("rmi", "-f", app)
    assert counts(served)[app] == [0, 0, 0]


def test_a_container_is_used_as_any(served: Instance, old: Podman, app: str) -> None:
    """And what is pruned is given back, but not what a container needs."""
    run = ("run", "-d", "--stop-timeout=0", "--name", "one", app, "/bin/sleep", "infinity")
    old.succeed(*run)
    assert old.succeed("exec", "one", "/bin/cat", "/etc/name") == "third"
    old.succeed("exec", "one", "/bin/sh", "-c", "echo written > /etc/name")
    old.succeed("system", "prune", "-af")
    assert counts(served)[app] == [1, 1, 1]
    old.succeed("restart", "one")
    assert old.succeed("exec", "one", "/bin/cat", "/etc/name") == "written"
    old.succeed("rm", "-f", "one")
    old.succeed("image", "prune", "-af")
    assert counts(served)[app] == [0, 0, 0]
    old.succeed("run", "--rm", app)
    old.succeed("system", "prune", "-af")
    assert counts(served)[app] == [0, 0, 0]
    assert old.images() == {}


def test_what_is_there_without_a_daemon_does_not_break_podman(
    served: Instance, old: Podman, app: str
) -> None:
    """Nor does anything stay that was kept for images that podman has removed meanwhile."""
    old.succeed("pull", "-q", app)
    old.succeed("save", "-q", "-o", old.base / "saved.tar", app)
    old.succeed("rmi", app)
    assert list((served.root / "podman/blobs").iterdir())
    served.succeed("daemon", "--stop")
    wait_until(lambda: not served.has_daemon())
    assert list((served.root / "podman/layers").iterdir()) == []
    old.succeed("pull", "-q", app)
    assert unpulled(old) == 0
    assert old.succeed("run", "--rm", app) == "third"
    served.start()
    for folder in ("blobs", "trees"):
        assert list((served.root / "podman" / folder).iterdir()) == []


def test_layers_are_served_again_after_a_restart(served: Instance, old: Podman, app: str) -> None:
    old.succeed("pull", "-q", app)
    served.succeed("daemon", "--stop")
    wait_until(lambda: not served.has_daemon())
    served.start()
    assert old.succeed("run", "--rm", app) == "third"
    old.succeed("rmi", app)
    assert counts(served)[app] == [0, 0, 0]


DIES = """
import os, signal
from snapshotter.cli.main import main
from snapshotter.podman.held import HeldImages

change = HeldImages.change

def change_and_die(self, *arguments):
    if os.path.exists({mark!r}):
        return change(self, *arguments)
    if {counted}:
        change(self, *arguments)
    open({mark!r}, "x").close()
    os.kill(os.getpid(), signal.SIGKILL)

HeldImages.change = change_and_die
main()
"""


def test_a_reset_gives_layers_back(served: Instance, old: Podman, app: str) -> None:
    """podman throws its graph root away; nothing of ours goes with it."""
    old.succeed("pull", "-q", app)
    old.settle()
    old.succeed("system", "reset", "-f")
    assert counts(served)[app] == [0, 0, 0]
    assert old.succeed("run", "--rm", app) == "third"
    assert counts(served)[app] == [1, 1, 1]


@pytest.mark.parametrize("counted", [False, True])
def test_a_daemon_that_dies_while_it_counts(
    served: Instance, old: Podman, app: str, tmp_path: Path, counted: bool
) -> None:
    """Just before a use is on disk, or just after, when podman has no answer yet."""
    heeded = served.log().count("was heeded before")
    for command, left in ((("pull", "-q", app), 1), (("rmi", app), 0)):
        mark = str(tmp_path / command[0])
        os.kill(greeter(served.state), signal.SIGKILL)
        program = DIES.format(mark=mark, counted=counted)
        dies = served.launch(program=(sys.executable, "-c", program))
        wait_until(lambda: served.answers(dies))  # noqa: B023
        with old.start(*command) as process:
            assert dies.wait(timeout=30) == -signal.SIGKILL
            served.start()
            ends_well(process, served)
        assert counts(served)[app] == [left] * 3
    assert served.log().count("was heeded before") - heeded == (2 if counted else 0)


DIES_OF_A_READ = """
import os, signal
from snapshotter.cli.main import main
from snapshotter.podman.layer_store import LayerStoreView

async def die(*arguments):
    os.kill(os.getpid(), signal.SIGKILL)

LayerStoreView.read = die
main()
"""


def test_a_daemon_that_dies_while_podman_reads_of_a_layer(
    served: Instance, old: Podman, app: str
) -> None:
    """The next daemon knows the file that podman has open, which nobody looks up there."""
    os.kill(greeter(served.state), signal.SIGKILL)
    dies = served.launch(program=(sys.executable, "-c", DIES_OF_A_READ))
    wait_until(lambda: served.answers(dies))
    with old.start("pull", "-q", app) as process:
        assert dies.wait(timeout=30) == -signal.SIGKILL
        served.start()
        ends_well(process, served)
    assert counts(served)[app] == [1, 1, 1]


def ends_well(process: subprocess.Popen[str], served: Instance) -> None:
    """Wait for a podman that has to succeed. All that was said is told if it does not."""
    try:
        _, errors = process.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        process.kill()
        _, errors = process.communicate()
    said = f"podman {process.args}: {process.returncode}\n{errors}\n{served.log()}"
    assert process.returncode == 0, said


def test_killed_while_podman_pulls_and_removes(served: Instance, old: Podman, app: str) -> None:
    """podman waits for the next daemon, and both have the same in their books."""
    for round_ in range(KILLS):
        for *command, left in (("pull", "-q", app, 1), ("run", "--rm", app, 1), ("rmi", app, 0)):
            with old.start(*command) as process:
                time.sleep(0.05 + 0.37 * (round_ / KILLS))  # it must be right everywhere
                os.kill(greeter(served.state), signal.SIGKILL)
                served.start()
                ends_well(process, served)
            assert counts(served).get(app, [0] * 3) == [left] * 3
        assert old.images() == {}


def test_doctor_finds_nothing_to_mend(served: Instance, old: Podman) -> None:
    images = served.root / "podman/images"
    old.configure(
        additionalimagestores=[images], additionallayerstores=[f"{served.root}/podman/layers:ref"]
    )
    found = served.succeed("doctor", "podman", "--storage-conf", old.base / "storage.conf")
    assert "ok: layer-store: podman reads" in found
    assert "ok: images: what is in the image store can be run" in found
