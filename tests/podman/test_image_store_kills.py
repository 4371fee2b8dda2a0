"""The daemon is killed while an image comes into podman's image store, or leaves it."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from snapshotter.podman.held import HeldImages
from tests.support.instance import Instance, greeter, wait_until
from tests.support.podman import VERSIONS

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.support.podman import Podman

pytestmark = pytest.mark.root

KILLS = int(os.environ.get("FIRSTBYTE_PODMAN_IMAGE_KILLS", "2"))
"""How often for each podman, in the midst of each change in turn; 2.5 s each."""

CHANGES = ((("add",), 26), (("rm",), 12), (("add", "--layers"), 60), (("rm",), 12))
"""Each has about so many steps on the disk; one that has fewer is through by the kill."""


@pytest.fixture(scope="module", autouse=True)
def nothing_stays(here: Instance, any_podman: Podman, other: str) -> Iterator[None]:
    """And a container runs."""
    if not greeter(here.state):
        here.start()
    here.succeed("podman", "add", other)
    any_podman.succeed("run", "-d", "--name", "lives", other, "/bin/sleep", "infinity")
    yield
    any_podman.reset()
    for image in json.loads(here.succeed("podman", "ls", "--json")):
        here.succeed("podman", "rm", image["id"])
    here.succeed("daemon", "--stop")
    wait_until(lambda: not greeter(here.state))
    here.start()
    assert everything_of(here) == ["images/overlay/l"]
    assert HeldImages(here.root / "podman/layers.json").images == []


def everything_of(here: Instance) -> list[str]:
    """Whatever there is for images: trees, blobs, layers, what podman reads of them."""
    folder = here.root / "podman"
    places = ("trees/*", "blobs/*", "images/overlay/*", "images/overlay/l/*")
    images = [path for path in (folder / "images/overlay-images").iterdir() if path.is_dir()]
    found = [path for place in places for path in folder.glob(place)]
    return sorted(str(path.relative_to(folder)) for path in (*found, *images))


DIES = """
import os, signal, sys
from snapshotter.cli.main import main

events = {{"open", "os.mkdir", "os.rename", "os.symlink", "os.remove"}}
left = {step}

def count(event, arguments):
    global left
    if event not in events or not os.path.exists({begun!r}):
        return
    if event == "open" and not (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR):
        return
    if any(str(one).startswith({places!r}) for one in arguments[:2]):
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(count)
main()
"""


def start_dying(here: Instance, program: str) -> subprocess.Popen[bytes]:
    """A daemon that is going to die, in the place of the one that runs."""
    os.kill(greeter(here.state), signal.SIGKILL)
    daemon = here.launch(program=(sys.executable, "-c", program))
    wait_until(lambda: here.answers(daemon))
    return daemon


def test_each_change_is_done_or_not(
    here: Instance, any_podman: Podman, app: str, other: str, tmp_path: Path
) -> None:
    """Wherever the daemon dies, podman finds an image that runs, or none; and what it runs goes on.
    Then the command can be given again."""
    turn = VERSIONS.index(any_podman.version)
    source = random.Random(turn)
    places = tuple(f"{here.root}/{name}/" for name in ("podman", "images", "indexes"))
    for number in range(KILLS):
        words, steps = CHANGES[(2 * turn + number) % len(CHANGES)]
        change = ("podman", *words, app)
        step, begun = source.randint(1, steps), tmp_path / str(number)
        daemon = start_dying(here, DIES.format(step=step, begun=str(begun), places=places))
        with any_podman.start("run", "--rm", other) as beside:
            begun.touch()
            first = here.run(*change)
            daemon.kill()
            shown = app in any_podman.images()
            here.start()
            assert beside.communicate(timeout=60)[0] == "of the other\n"
        there = app in any_podman.images()
        print(words, step, daemon.wait(), first.returncode, shown, there)
        assert there or not shown  # a removal that was not finished is undone
        if there:
            assert any_podman.succeed("run", "--rm", "--pull=never", app) == "third"
        assert any_podman.succeed("exec", "lives", "/bin/cat", "/etc/name") == "of the other"
        if change[1] == "rm" and not there:
            assert "no image" in here.fail(*change)
        else:
            here.succeed(*change)
        assert (app in any_podman.images()) is (change[1] == "add")


DIES_OF_A_REMOVAL = """
import os, signal, time
from snapshotter.cli.main import main
from snapshotter.podman.graph_root import GraphRoot

withdraw = GraphRoot.withdraw

def withdraw_and_die(self, image):
    open({mark!r}, "x").close()
    while os.path.exists({mark!r}):
        time.sleep(0.01)
    withdraw(self, image)
    os.kill(os.getpid(), signal.SIGKILL)

GraphRoot.withdraw = withdraw_and_die
main()
"""


def test_a_container_that_was_faster_than_the_removal_of_its_image(
    here: Instance, any_podman: Podman, app: str, tmp_path: Path
) -> None:
    """It has come when the daemon has seen that nothing uses the image, and dies before it looks
    again: the image is there as before."""
    option = () if any_podman.version == "4.3" else ("--layers",)
    here.succeed("podman", "add", *option, app)
    mark = tmp_path / "mark"
    daemon = start_dying(here, DIES_OF_A_REMOVAL.format(mark=str(mark)))
    command, environment = here.command("podman", "rm", app), os.environ | here.environment
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE) as removal:
        wait_until(mark.exists)
        any_podman.succeed("run", "-d", "--name", "faster", app, "/bin/sleep", "infinity")
        mark.unlink()
        assert daemon.wait(timeout=30) == -signal.SIGKILL
        assert removal.wait(timeout=30) == 1
    here.start()
    assert any_podman.succeed("exec", "faster", "/bin/ls", "/srv") == "big"
    assert "container faster" in here.fail("podman", "rm", app)
    any_podman.succeed("rm", "-f", "-t", "0", "faster")
    here.succeed("podman", "rm", app)
