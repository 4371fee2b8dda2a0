"""The daemon as people meet it: commands, real mounts, kills, and what is left afterwards."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import stat
import subprocess
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

from snapshotter.mounts import syscalls
from snapshotter.mounts.table import mount_at
from tests.support import tars
from tests.support.instance import Instance, instance, wait_until
from tests.support.layouts import write_layout
from tests.support.nobody import as_nobody

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

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


def test_what_nobody_serves_is_stopped_where_it_is(node: Instance) -> None:
    """By a daemon that is started for that, with the directories that are meant."""
    node.succeed("daemon", "--stop")
    wait_until(lambda: not node.has_daemon())
    assert f"ready: data in {node.root}" in node.log()


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
    wait_until(lambda: not node.has_daemon())
    assert not (node.state / "firstbyte-control.sock").exists()


def test_waiting_for_local_ends_when_all_of_it_is_here(node: Instance, layout: str) -> None:
    target = node.directory("m")
    mounted = json.loads(node.succeed("mount", layout, target, "--wait-local", "--json"))
    assert mounted["state"] == "local"
    assert mounted["local_bytes"] == mounted["total_bytes"] > len(BIG)
    (shown,) = node.status()["mounts"]
    assert shown == mounted
    assert f"{target}: {layout}, local (" in node.succeed("status")


def test_one_image_in_two_directories_is_one_view(node: Instance, layout: str) -> None:
    """They share the kernel's page cache, because they are one file system tree."""
    first, second = node.directory("first"), node.directory("second")
    node.succeed("mount", layout, first)
    node.succeed("mount", layout, second)
    assert os.stat(first / "big").st_ino == os.stat(second / "big").st_ino
    trees = [path for path in (node.state / "fs").iterdir() if path.is_dir()]
    assert len(trees) == 1
    node.succeed("umount", first)
    assert (second / "big").read_bytes() == BIG
    node.succeed("umount", second)
    wait_until(lambda: not node.has_daemon())


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
    wait_until(lambda: node.mounts() == [])  # the daemon that had been started for it ends
    wait_until(lambda: not node.has_daemon())


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
    wait_until(lambda: not node.has_daemon())
    assert node.mounts() == []


def test_not_root_is_one_line(node: Instance, layout: str) -> None:
    done = as_nobody(
        "main.main(sys.argv[1:])",
        *node.command("mount", layout, node.base)[3:],
        imports="import os, sys; from snapshotter.cli import main, mount; os.environ['HOME'] = '/'",
    )
    assert done.returncode == 1
    assert done.stderr == (
        "firstbyte: images are mounted by root alone: use sudo, or podman unshare if the mount is "
        "for podman\n"
    )


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
    wait_until(lambda: not node.has_daemon())


def test_instances_live_side_by_side(layout: str) -> None:
    with instance() as one, instance() as other:
        first, second = one.directory("m"), other.directory("m")
        one.succeed("mount", layout, first)
        other.succeed("mount", layout, second)
        one.succeed("umount", first)
        wait_until(lambda: not one.has_daemon())
        assert (second / "big").read_bytes() == BIG


def test_one_root_serves_one_daemon(node: Instance, layout: str) -> None:
    node.start()
    with instance() as other:
        other.root = node.root
        assert "another process" in other.fail("mount", layout, other.directory("m"))
        assert other.mounts() == []


@pytest.mark.parametrize("mode", ["fuse", "erofs", "native"])
def test_what_a_killed_daemon_had_mounted_goes_on_with_the_next(
    node: Instance, layout: str, mode: str
) -> None:
    target = node.directory("m")
    node.succeed("mount", layout, target, "--mode", mode)
    held = os.open(target / "big", os.O_RDONLY)
    try:
        os.kill(node.status()["pid"], signal.SIGKILL)
        wait_until(lambda: not node.has_daemon())
        node.succeed("mount", layout, node.directory("other"))
        assert os.pread(held, len(BIG), 0) == BIG
        assert (target / "etc" / "name").read_text() == "upper\n"
        (shown, _) = node.status()["mounts"]
        assert (shown["target"], shown["mode"]) == (str(target), mode)
    finally:
        os.close(held)
    node.succeed("umount", target)
    node.succeed("umount", node.base / "other")
    wait_until(lambda: not node.has_daemon())
    assert node.mounts() == []
    assert node.holders() == []


def test_a_reader_waits_for_the_next_daemon(node: Instance, layout: str) -> None:
    target = node.directory("m")
    node.succeed("mount", layout, target, "--mode", "fuse")
    os.kill(node.status()["pid"], signal.SIGKILL)
    wait_until(lambda: not node.has_daemon())
    command = ["cat", target / "big"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as reader:
        with pytest.raises(subprocess.TimeoutExpired):
            reader.wait(0.5)
        node.start()
        data, _ = reader.communicate(timeout=30)
    assert data == BIG


def test_a_reader_that_waits_can_be_killed(node: Instance, layout: str) -> None:
    target = node.directory("m")
    node.succeed("mount", layout, target, "--mode", "fuse")
    os.kill(node.status()["pid"], signal.SIGKILL)
    wait_until(lambda: not node.has_daemon())
    with subprocess.Popen(["cat", target / "big"], stdout=subprocess.DEVNULL) as reader:
        reader.kill()
        assert reader.wait(30) == -signal.SIGKILL
    node.succeed("umount", target)


def test_a_file_system_that_cannot_go_on_is_detached(node: Instance, layout: str) -> None:
    """Daemon and holder are both dead: what they had mounted answers nothing any more."""
    target = node.directory("m")
    node.succeed("mount", layout, target, "--mode", "erofs")
    pid = node.status()["pid"]
    for holder in node.holders():
        os.kill(holder, signal.SIGKILL)
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not node.has_daemon())
    node.succeed("mount", layout, node.directory("other"))
    assert f"detaching {target}" in node.log()
    assert mount_at(target) is None
    node.succeed("mount", layout, target)
    assert (target / "big").read_bytes() == BIG


def test_umount_by_another_program_is_noticed(node: Instance, layout: str) -> None:
    target = node.directory("m")
    node.succeed("mount", layout, target)
    syscalls.unmount(target)
    assert node.status()["mounts"] == []
    wait_until(lambda: not node.has_daemon())
    assert node.mounts() == []


def test_an_interrupt_takes_everything_down_in_use_or_not(node: Instance, layout: str) -> None:
    process = node.start()
    target = node.directory("m")
    node.succeed("mount", layout, target)
    node.succeed("umount", target)
    assert process.poll() is None  # started by hand, so it stays
    node.succeed("mount", layout, target)
    held = os.open(target, os.O_RDONLY)
    try:
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
    finally:
        os.close(held)
    assert node.mounts() == []
    assert node.holders() == []
    assert not list(node.state.glob("*.sock"))


def test_a_service_manager_that_ends_it_leaves_what_is_mounted(node: Instance, layout: str) -> None:
    process = node.start()
    target = node.directory("m")
    node.succeed("mount", layout, target, "--mode", "fuse")
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0
    assert mount_at(target) is not None
    node.start()
    assert (target / "big").read_bytes() == BIG
    node.succeed("daemon", "--stop")
    assert node.mounts() == []
    assert node.holders() == []


def test_a_service_manager_that_ends_it_leaves_nothing_if_nothing_is_mounted(
    node: Instance,
) -> None:
    process = node.start()
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0
    assert node.mounts() == []
    assert node.holders() == []


def test_a_daemon_replaces_one_that_runs(node: Instance, layout: str) -> None:
    first = node.start()
    target = node.directory("m")
    node.succeed("mount", layout, target, "--mode", "fuse")
    with (target / "big").open("rb") as file:
        second = node.start("--replace")
        assert first.wait(30) == 0
        assert file.read() == BIG
    wait_until(lambda: node.status()["pid"] == second.pid)
    (shown,) = node.status()["mounts"]
    assert shown["target"] == str(target)


def test_what_the_kernel_can_do_is_known_before_anybody_waits_for_it(node: Instance) -> None:
    node.start()
    wait_until(lambda: "the kernel: " in node.log())


def test_a_second_daemon_on_one_state_is_refused_while_the_first_lives(
    node: Instance, layout: str
) -> None:
    process = node.start()
    assert "another daemon is running" in node.fail("daemon")
    assert process.poll() is None
    target = node.directory("m")
    node.succeed("mount", layout, target)
    assert (target / "big").read_bytes() == BIG


def test_umount_takes_down_what_a_killed_daemon_left(node: Instance, layout: str) -> None:
    target = node.directory("m")
    node.succeed("mount", layout, target)
    os.kill(node.status()["pid"], signal.SIGKILL)
    wait_until(lambda: not node.has_daemon())
    node.succeed("umount", target)
    assert node.mounts() == []
    wait_until(lambda: not node.has_daemon())
    assert node.holders() == []


@pytest.fixture
def silent_registry() -> Iterator[tuple[str, Callable[[], None]]]:
    """A registry that takes connections and never answers; and a wait until it has one."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(30)
        with ExitStack() as connections:

            def wait_for_client() -> None:
                connections.enter_context(server.accept()[0])

            yield f"127.0.0.1:{server.getsockname()[1]}/silent", wait_for_client


def test_interrupting_a_mount_ends_it_in_the_daemon_too(
    node: Instance, silent_registry: tuple[str, Callable[[], None]]
) -> None:
    reference, wait_for_client = silent_registry
    target = node.directory("m")
    with subprocess.Popen(
        node.command("mount", reference, target), stderr=subprocess.PIPE, text=True
    ) as command:
        wait_for_client()
        command.send_signal(signal.SIGINT)
        _, stderr = command.communicate(timeout=30)
    assert command.returncode == 130
    assert stderr.strip() == "firstbyte: interrupted"
    wait_until(lambda: not node.has_daemon())  # with nothing to do, it has ended
    assert node.mounts() == []


def test_a_signal_interrupts_requests_and_their_clients_are_told(
    node: Instance, silent_registry: tuple[str, Callable[[], None]]
) -> None:
    reference, wait_for_client = silent_registry
    daemon = node.start()
    with subprocess.Popen(
        node.command("mount", reference, node.directory("m")), stderr=subprocess.PIPE, text=True
    ) as command:
        wait_for_client()
        daemon.send_signal(signal.SIGTERM)
        _, stderr = command.communicate(timeout=30)
    assert stderr.strip() == "firstbyte: the daemon is ending"
    assert daemon.wait(30) == 0
    assert node.mounts() == []


def test_a_directory_that_is_being_mounted_on_is_taken(
    node: Instance, layout: str, silent_registry: tuple[str, Callable[[], None]]
) -> None:
    reference, wait_for_client = silent_registry
    target = node.directory("m")
    with subprocess.Popen(
        node.command("mount", reference, target), stderr=subprocess.DEVNULL
    ) as command:
        wait_for_client()
        assert f"is preparing {reference}" in node.fail("mount", layout, target)
        assert "is only being mounted" in node.fail("umount", target)
        command.send_signal(signal.SIGINT)
