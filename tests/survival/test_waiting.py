"""Who waits for a byte when the daemon goes: is answered by the next one, or can be killed."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from snapshotter.daemon.descriptors import Holder
from snapshotter.mounts import syscalls
from snapshotter.mounts.capabilities import SAMPLE_LAYER, sample_image
from snapshotter.mounts.erofs import mount_erofs
from tests.support.gateway import Gateway, gateway
from tests.support.instance import Instance, firstbyte, wait_until
from tests.support.layouts import write_layout
from tests.support.leaks import becomes
from tests.support.registry import RunningRegistry, skopeo_push
from tests.support.tars import file, tar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

pytestmark = pytest.mark.root

BIG = random.Random(1).randbytes(6 << 20)
SUM = hashlib.sha256(BIG).hexdigest()
MODES = ("fuse", "erofs")
DATA = ("fuse_file_read_iter", "fuse_direct", "folio_")  # where readers wait for it in the kernel
RANGES = b"bytes="  # in requests for parts of layers


@dataclass(frozen=True)
class Images:
    """Two images behind a gateway, named by digest: asking for them again needs no network."""

    way: Gateway
    one: str
    another: str


@pytest.fixture(scope="module")
def images(registry: RunningRegistry, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Images]:
    digests = []
    for name in ("one", "another"):
        layout = tmp_path_factory.mktemp(name) / "layout"
        tree = tar(file(b"big", BIG), file(b"other", BIG[::-1] + name.encode()))
        digests.append(write_layout(layout, [tree]))
        skopeo_push(layout, registry.reference(name))
        firstbyte("index", "build", registry.reference(name), "--push")
    with gateway(registry.host) as way:
        yield Images(way, f"{way.host}/one@{digests[0]}", f"{way.host}/another@{digests[1]}")


def terminated(here: Instance, daemon: subprocess.Popen[bytes]) -> None:
    daemon.send_signal(signal.SIGTERM)
    assert daemon.wait(30) == 0


def killed(here: Instance, daemon: subprocess.Popen[bytes]) -> None:
    daemon.kill()
    daemon.wait(30)


def replaced(here: Instance, daemon: subprocess.Popen[bytes]) -> None:
    here.start("--replace")
    assert daemon.wait(30) == 0


@pytest.mark.parametrize("end", [terminated, killed, replaced])
def test_a_read_that_waits_for_the_network_is_answered_by_the_next_daemon(
    here: Instance, images: Images, end: Callable[[Instance, subprocess.Popen[bytes]], None]
) -> None:
    daemon = here.start()
    with ExitStack() as stack:
        with images.way.held_at(RANGES) as reached:
            targets = _mount(here, images)
            readers = [_read(stack, "sha256sum", target / "big") for target in targets]
            assert reached.wait(30)
            _until_asleep(readers)
            end(here, daemon)
            if end is not replaced:
                here.start()
            assert [reader.poll() for reader in readers] == [None] * len(readers)
        for reader in readers:
            said, _ = reader.communicate(timeout=60)
            assert said.split()[0] == SUM


@pytest.mark.parametrize("end", [terminated, killed])
def test_who_waits_while_no_daemon_runs_can_be_killed(
    here: Instance, images: Images, end: Callable[[Instance, subprocess.Popen[bytes]], None]
) -> None:
    """Also who had been waiting for something that the daemon was told, and did not answer."""
    daemon = here.start()
    direct = ["dd", "iflag=direct", "of=/dev/null", "bs=64k", "status=none"]
    with ExitStack() as stack:
        with images.way.held_at(RANGES) as reached:
            targets = _mount(here, images)
            before = [_read(stack, "cat", target / "big") for target in targets]
            before.append(_read(stack, *direct, f"if={targets[0] / 'other'}"))
            assert reached.wait(30)
            _until_asleep(before)
            end(here, daemon)
        after = [_read(stack, "cat", target / "other") for target in targets]
        # The kernel's EROFS needs nobody to look a name up.
        after += [_read(stack, "ls", targets[0] / name) for name in ("not-there", "nor-this")]
        _until_asleep(after, places=(*DATA, "fuse_lookup"))
        for reader in reversed([*before, *after]):  # nobody waits for who came first
            reader.kill()
            assert reader.wait(30) == -signal.SIGKILL
        here.start()
        for target in targets:
            assert _sum(target / "big") == SUM
            here.succeed("umount", target)


def test_the_first_daemon_may_die_before_it_has_spoken_to_the_kernel(
    here: Instance, images: Images
) -> None:
    """The kernel says once what it can do, and nobody answers it when the next daemon starts."""
    daemon = here.launch()
    while not (kept := Holder(here.state / "holder.sock").kept()):
        time.sleep(0.001)
    killed(here, daemon)
    os.close(kept["fuse"])
    here.start()
    (target, _) = _mount(here, images)
    assert _sum(target / "big") == SUM


def test_an_image_that_nobody_wants_any_more_does_not_keep_the_next_daemon(
    here: Instance, images: Images
) -> None:
    """The mount went while no daemon ran; the next one ends by itself, as if it had never been."""
    target, other = here.directory("m"), here.directory("other")
    here.succeed("mount", images.one, target, "--mode", "fuse")
    os.kill(here.status()["pid"], signal.SIGKILL)
    wait_until(lambda: not here.has_daemon())
    syscalls.unmount(target)
    here.succeed("mount", images.another, other, "--mode", "fuse")
    here.succeed("umount", other)
    wait_until(lambda: not here.has_daemon())
    assert here.mounts() == []
    assert here.holders() == []


def test_what_a_service_manager_keeps_is_for_its_own_daemon(here: Instance, images: Images) -> None:
    """Its daemon has died, and a command comes before the next one: nothing is taken down."""
    daemon = here.start()
    targets = _mount(here, images)
    holder = Holder(here.state / "holder.sock")
    kept = holder.kept()
    for pid in here.holders():
        os.kill(pid, signal.SIGKILL)
    killed(here, daemon)
    other = here.directory("other")
    assert "waits for the daemon of a service manager" in here.fail("mount", images.one, other)
    for name, descriptor in kept.items():
        holder.keep(name, descriptor)
        os.close(descriptor)
    here.start()
    for target in targets:
        assert _sum(target / "big") == SUM
        here.succeed("umount", target)


READS_ITSELF = """
import mmap, os, sys, threading, time

def read(path):
    while not os.path.exists(path):
        time.sleep(0.01)
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
    os.readv(descriptor, [mmap.mmap(-1, 1 << 16)])

threading.Thread(target=read, args=(sys.argv.pop(1),), daemon=True).start()
from snapshotter.cli.main import main
main()
"""


def test_a_daemon_that_waits_for_itself_when_it_is_killed_does_not_hold_up_the_next(
    here: Instance, images: Images
) -> None:
    """Its process stays until somebody answers what one of its own threads has asked."""
    target = here.directory("fuse")
    daemon = here.launch(program=(sys.executable, "-c", READS_ITSELF, str(target / "big")))
    wait_until(lambda: here.answers(daemon))
    with images.way.held_at(RANGES):
        here.succeed("mount", images.one, target, "--mode", "fuse")
        wait_until(lambda: _is_in_kernel(daemon.pid, "fuse_direct_IO"))
        daemon.kill()
        here.start()
    daemon.wait(30)
    assert _sum(target / "big") == SUM
    here.succeed("umount", target)


def test_what_a_daemon_left_where_it_tried_the_kernel_goes_and_holds_up_nobody(
    here: Instance, images: Images
) -> None:
    """It was killed with a mount of files of its own FUSE mount, of which a read is under way: the
    kernel unmounts that when somebody has answered."""
    daemon = here.start()
    (here.root / "probe-stray").mkdir()
    left = here.root / "probe-left" / "mount"
    left.mkdir(parents=True)
    with ExitStack() as stack:
        with images.way.held_at(RANGES) as reached:
            target = here.directory("fuse")
            here.succeed("mount", images.one, target, "--mode", "fuse")
            (image,) = (here.state / "fs").glob("*.erofs")
            (layer,) = (here.state / "fs").glob("*.raw")
            mount_erofs(image, [layer], left)
            reader = _read(stack, "cat", left / "big")
            assert reached.wait(30)
            _until_asleep([reader])
            killed(here, daemon)
            reader.kill()
            here.start()
            becomes(
                lambda: [entry.point for entry in here.mounts() if b"probe-" in entry.point], []
            )
        becomes(lambda: sorted(here.root.glob("probe-*")), [])
        assert _sum(target / "big") == SUM
        here.succeed("umount", target)


@pytest.mark.parametrize("options", [(), ("--mode", "fuse")])
def test_a_daemon_that_a_command_has_started_removes_what_another_left(
    here: Instance, images: Images, options: Sequence[str]
) -> None:
    """Also one that does not try the kernel itself."""
    folder = here.root / "probe-left"
    (folder / "mount").mkdir(parents=True)
    (folder / "image").write_bytes(sample_image())
    (folder / "layer").write_bytes(SAMPLE_LAYER)
    mount_erofs(folder / "image", [folder / "layer"], folder / "mount")
    target = here.directory("m")
    here.succeed("mount", images.one, target, *options)
    becomes(lambda: sorted(here.root.glob("probe-*")), [])
    assert _sum(target / "big") == SUM
    here.succeed("umount", target)
    wait_until(lambda: not here.has_daemon())
    assert here.mounts() == []


def _is_in_kernel(pid: int, place: str) -> bool:
    """Whether one of a process's threads is there."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return any(place in (task / "stack").read_text() for task in tasks)


def _mount(here: Instance, images: Images) -> Sequence[Path]:
    targets = [here.directory(mode) for mode in MODES]
    for target in targets:
        here.succeed("mount", images.one, target, "--mode", target.name)
    return targets


def _read(stack: ExitStack, *command: str | Path) -> subprocess.Popen[str]:
    """A reader, which is gone at the end in any case."""
    reader = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd="/"
    )
    stack.callback(_end, reader)
    return reader


def _end(reader: subprocess.Popen[str]) -> None:
    """Not for ever: one that cannot be killed would keep all other tests from running."""
    reader.kill()
    assert reader.stdout is not None
    reader.stdout.close()
    reader.wait(30)


def _until_asleep(readers: Sequence[subprocess.Popen[str]], places: Sequence[str] = DATA) -> None:
    """Until all of them wait in one of these places of the kernel."""

    def waits(reader: subprocess.Popen[str]) -> bool:
        stack = Path(f"/proc/{reader.pid}/stack").read_text()
        return any(place in stack for place in places)

    wait_until(lambda: all(map(waits, readers)))


def _sum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
