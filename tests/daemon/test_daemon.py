"""The daemon as people meet it: commands, real mounts, kills, and what is left afterwards."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import stat
import subprocess
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from snapshotter.mounts import syscalls
from snapshotter.mounts.table import mount_at
from tests.support import tars
from tests.support.instance import Instance, instance, wait_until
from tests.support.layouts import write_layout

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.root

BIG = random.Random(1).randbytes(3 << 20)


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The reference of an image of two layers, without a file index."""
    path = tmp_path_factory.mktemp("layout")
    lower = tars.tar(
        tars.directory(b"etc"), tars.file(b"etc/name", b"lower\n"), tars.file(b"big", BIG)
    )
    upper = tars.tar(tars.file(b"etc/name", b"upper\n"), tars.symlink(b"link", b"etc/name"))
    write_layout(path, [lower, upper])
    return f"oci:{path}"


@pytest.fixture
def node() -> Iterator[Instance]:
    with instance() as made:
        yield made


def test_an_image_is_mounted_read_and_taken_down(node: Instance, layout: str) -> None:
    target = node.directory("m")
    assert node.succeed("mount", layout, target) == f"mounted {layout} at {target}\n"
    assert (target / "etc" / "name").read_text() == "upper\n"
    assert (target / "link").read_text() == "upper\n"
    assert (target / "big").read_bytes() == BIG
    entry = mount_at(target)
    assert entry is not None
    assert b"ro" in entry.options
    assert entry.optional == ()
    node.succeed("umount", target)
    assert node.mounts() == []
    assert list(target.iterdir()) == []
    assert not node.has_daemon()
    assert not (node.state / "firstbyte-control.sock").exists()


def test_waiting_for_local_ends_when_all_of_it_is_here(node: Instance, layout: str) -> None:
    target = node.directory("m")
    mounted = json.loads(node.succeed("mount", layout, target, "--wait-local", "--json"))
    assert mounted["state"] == "local"
    assert mounted["local_bytes"] == mounted["total_bytes"] > len(BIG)
    (shown,) = node.status()["mounts"]
    assert shown == mounted
    assert f"{target}: {layout}, local (fuse)" in node.succeed("status")


def test_one_image_in_two_directories_is_one_view(node: Instance, layout: str) -> None:
    """They share the kernel's page cache, because they are one file system tree."""
    first, second = node.directory("first"), node.directory("second")
    node.succeed("mount", layout, first)
    node.succeed("mount", layout, second)
    assert os.stat(first / "big").st_ino == os.stat(second / "big").st_ino
    assert len(list((node.state / "fs").iterdir())) == 1
    node.succeed("umount", first)
    assert (second / "big").read_bytes() == BIG
    node.succeed("umount", second)
    assert not node.has_daemon()


def test_mounting_again_knows_the_index(node: Instance, layout: str) -> None:
    target = node.directory("m")
    node.succeed("mount", layout, target, "--wait-local")
    node.succeed("umount", target)
    node.succeed("mount", layout, target)
    assert (target / "big").read_bytes() == BIG
    assert node.log().count("to build one") == 1


def test_a_mount_in_use_stays(node: Instance, layout: str) -> None:
    target = node.directory("m")
    node.succeed("mount", layout, target)
    with (target / "big").open("rb") as file:
        assert "is in use" in node.fail("umount", target)
        assert file.read() == BIG
    node.succeed("umount", target)


def test_a_directory_with_something_in_it_is_refused(node: Instance, layout: str) -> None:
    target = node.directory("m")
    (target / "precious").touch()
    assert "is not empty (it holds precious)" in node.fail("mount", layout, target)
    assert "does not exist: mkdir -p" in node.fail("mount", layout, node.base / "none")
    assert node.mounts() == []
    assert not node.has_daemon()


def test_a_mount_point_is_refused(node: Instance, layout: str) -> None:
    target = node.directory("m")
    node.succeed("mount", layout, target)
    assert "choose another directory" in node.fail("mount", layout, target)
    assert (target / "etc" / "name").read_text() == "upper\n"


def test_what_is_not_mounted_cannot_be_taken_down(node: Instance, layout: str) -> None:
    target, other = node.directory("m"), node.directory("other")
    assert "no daemon runs" in node.fail("umount", other)
    node.succeed("mount", layout, target)
    assert f"no image is mounted at {other}" in node.fail("umount", other)


def test_an_image_that_is_not_there_is_one_line(node: Instance) -> None:
    target = node.directory("m")
    line = node.fail("mount", f"oci:{node.base}/none", target)
    assert "none" in line
    assert not node.has_daemon()
    assert node.mounts() == []


def test_not_root_is_one_line(node: Instance, layout: str) -> None:
    done = subprocess.run(
        node.command("mount", layout, node.base),
        user=65534,
        group=65534,
        extra_groups=[],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr == "firstbyte: images are mounted by root alone: use sudo\n"


def test_the_socket_is_for_its_owner_alone(node: Instance) -> None:
    node.start()
    assert stat.S_IMODE(os.stat(node.state / "firstbyte-control.sock").st_mode) == 0o600
    assert stat.S_IMODE(os.stat(node.state).st_mode) == 0o700


def test_two_mounts_at_once_start_one_daemon(node: Instance, layout: str) -> None:
    targets = [node.directory(f"m{number}") for number in range(4)]
    with ExitStack() as stack:
        commands = [
            stack.enter_context(
                subprocess.Popen(node.command("mount", layout, target), stdout=subprocess.DEVNULL)
            )
            for target in targets
        ]
        assert [command.wait(60) for command in commands] == [0] * len(targets)
    assert node.log().count("ready: data in") == 1
    assert len(node.status()["mounts"]) == len(targets)
    assert node.log().count("to build one") == 1
    for target in targets:
        assert (target / "big").read_bytes() == BIG
        node.succeed("umount", target)
    assert not node.has_daemon()


def test_instances_live_side_by_side(layout: str) -> None:
    with instance() as one, instance() as other:
        first, second = one.directory("m"), other.directory("m")
        one.succeed("mount", layout, first)
        other.succeed("mount", layout, second)
        one.succeed("umount", first)
        assert not one.has_daemon()
        assert (second / "big").read_bytes() == BIG


def test_one_root_serves_one_daemon(node: Instance, layout: str) -> None:
    node.start()
    with instance() as other:
        other.root = node.root
        assert "another process" in other.fail("mount", layout, other.directory("m"))
        assert other.mounts() == []


def test_a_killed_daemon_leaves_dead_mounts_and_its_successor_cleans_up(
    node: Instance, layout: str
) -> None:
    target = node.directory("m")
    node.succeed("mount", layout, target)
    held = os.open(target / "big", os.O_RDONLY)
    try:
        os.kill(node.status()["pid"], signal.SIGKILL)
        wait_until(lambda: not node.has_daemon())
        with pytest.raises(OSError, match=os.strerror(errno.ENOTCONN)):
            os.stat(target / "etc")
        node.succeed("mount", layout, node.directory("other"))
        assert f"detaching {target}" in node.log()
        assert mount_at(target) is None
        node.succeed("mount", layout, target)
        assert (target / "big").read_bytes() == BIG
    finally:
        with pytest.raises(OSError, match=os.strerror(errno.ENOTCONN)):
            os.close(held)  # the file of a server that is dead


def test_umount_by_another_program_is_noticed(node: Instance, layout: str) -> None:
    target = node.directory("m")
    node.succeed("mount", layout, target)
    syscalls.unmount(target)
    assert node.status()["mounts"] == []
    wait_until(lambda: not node.has_daemon())
    assert node.mounts() == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_takes_everything_down_in_use_or_not(
    node: Instance, layout: str, number: signal.Signals
) -> None:
    process = node.start()
    target = node.directory("m")
    node.succeed("mount", layout, target)
    node.succeed("umount", target)
    assert process.poll() is None  # started by hand, so it stays
    node.succeed("mount", layout, target)
    held = os.open(target, os.O_RDONLY)
    try:
        process.send_signal(number)
        assert process.wait(30) == 0
    finally:
        os.close(held)
    assert node.mounts() == []
    assert not (node.state / "firstbyte-control.sock").exists()


def test_a_second_daemon_on_one_state_is_refused_while_the_first_lives(
    node: Instance, layout: str
) -> None:
    process = node.start()
    second = subprocess.Popen(node.command("daemon"), stderr=subprocess.PIPE, text=True)
    finished = threading.Event()

    def wait() -> None:
        _, stderr = second.communicate()
        messages.append(stderr)
        finished.set()

    messages: list[str] = []
    thread = threading.Thread(target=wait)
    thread.start()
    target = node.directory("m")
    node.succeed("mount", layout, target)  # the first one serves on meanwhile
    assert finished.wait(60)
    thread.join()
    assert second.returncode == 1
    assert "another daemon is running" in messages[0]
    assert process.poll() is None
    assert (target / "big").read_bytes() == BIG
