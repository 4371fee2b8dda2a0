"""Many mounts at once, mounts in use, and a daemon that is killed right after it has answered."""

from __future__ import annotations

import os
import random
import signal
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from snapshotter.daemon import client, protocol
from snapshotter.daemon.places import Places
from snapshotter.mounts import syscalls
from snapshotter.mounts.table import mount_at
from tests.support.layouts import write_layout
from tests.support.leaks import becomes, footprint, shown_in
from tests.support.tars import file, tar

if TYPE_CHECKING:
    from tests.support.instance import Instance

pytestmark = pytest.mark.root

MOUNTS = int(os.environ.get("FIRSTBYTE_MOUNTS", "200"))
ANSWERS = int(os.environ.get("FIRSTBYTE_ANSWERS", "4"))
IMAGES = 10
MODES = ("fuse", "erofs", "native", "auto")
MEMORY = 32 << 20  # bytes that a second storm may take more than the first


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """They share a layer, and each has one of its own that tells its number."""
    shared = tar(file(b"shared", random.Random(1).randbytes(500_000)))
    found = []
    for number in range(IMAGES):
        layout = tmp_path_factory.mktemp("layout")
        write_layout(layout, [shared, tar(file(b"own", b"%d" % number))])
        found.append(f"oci:{layout}")
    return found


def test_hundreds_of_mounts_at_once_leave_nothing(here: Instance, images: list[str]) -> None:
    """Of the same images and of different ones, in all modes; each is read, and taken down."""
    daemon = here.start()
    targets = [here.directory(f"m{number}") for number in range(MOUNTS)]

    def one(number: int) -> None:
        target, image = targets[number], number % IMAGES
        mode = MODES[number // IMAGES % len(MODES)]
        _mount(here, images[image], target, mode)
        assert (target / "own").read_bytes() == b"%d" % image
        _umount(here, target)

    def storm() -> None:
        with ThreadPoolExecutor(MOUNTS) as threads:
            list(threads.map(one, range(MOUNTS)))
        becomes(lambda: _views(here), [])
        always = {os.fsencode(here.state / "fs"), os.fsencode(here.root / "podman/layers")}
        assert {entry.point for entry in here.mounts()} == always
        assert here.status()["mounts"] == []
        becomes(lambda: _layers_open(daemon.pid), [])

    storm()
    before = footprint(daemon.pid)
    storm()
    now = footprint(daemon.pid)
    assert _settled(now.files) == _settled(before.files)
    assert now.other <= before.other + 2
    assert now.resident <= before.resident + MEMORY
    daemon.send_signal(signal.SIGINT)
    assert daemon.wait(30) == 0
    assert here.mounts() == []


def test_what_was_answered_outlives_a_kill_right_after(here: Instance, images: list[str]) -> None:
    """Every time: what the next daemon needs is on the disk before the answer is given."""
    daemon = here.start()
    kept: list[tuple[Path, int]] = []

    for number in range(ANSWERS):
        target = here.directory(f"m{number}")
        _mount(here, images[number % IMAGES], target, MODES[number % len(MODES)])
        daemon.kill()
        kept.append((target, number % IMAGES))
        daemon.wait()
        daemon = here.start()
        for place, image in kept:
            assert (place / "own").read_bytes() == b"%d" % image
        assert _mounted(here) == [place for place, _ in kept]
        if number % 2:
            target, _ = kept.pop(0)
            _umount(here, target)
            daemon.kill()
            daemon.wait()
            daemon = here.start()
            assert _mounted(here) == [place for place, _ in kept]
            assert mount_at(target) is None
    for place, _ in kept:
        here.succeed("umount", place)
    becomes(lambda: _views(here), [])
    daemon.send_signal(signal.SIGINT)
    assert daemon.wait(30) == 0
    assert here.mounts() == here.holders() == []


@pytest.mark.parametrize("mode", ["fuse", "erofs", "native"])
def test_open_files_outlive_their_mount(here: Instance, images: list[str], mode: str) -> None:
    """A mount in use stays, and works, until it is detached by somebody; then its files do, as
    long as another mount of the image is there: which the next daemon shows, too."""
    daemon = here.start()
    targets = [here.directory(name) for name in ("one", "two")]
    for target in targets:
        here.succeed("mount", images[0], target, "--mode", mode)
    with (targets[0] / "shared").open("rb") as shared:
        assert "is in use" in here.fail("umount", targets[0])
        daemon.kill()
        daemon.wait()
        daemon = here.start()
        assert "is in use" in here.fail("umount", targets[0])
        assert shared.read(1000) == random.Random(1).randbytes(500_000)[:1000]
        syscalls.unmount(targets[0], detach=True)
        assert _mounted(here) == targets[1:]
        Path("/proc/sys/vm/drop_caches").write_text("3")
        assert shared.read() == random.Random(1).randbytes(500_000)[1000:]
    here.succeed("umount", targets[1])
    becomes(lambda: _views(here), [])


def _mount(here: Instance, reference: str, target: Path, mode: str) -> None:
    request = protocol.MountRequest(reference=reference, target=str(target), mode=mode)
    reply = client.ask(Places(here.root, here.state), request, start=None)
    assert isinstance(reply, protocol.Mounted), reply


def _umount(here: Instance, target: Path) -> None:
    request = protocol.UmountRequest(str(target))
    reply = client.ask(Places(here.root, here.state), request, start=None)
    assert isinstance(reply, protocol.Unmounted), reply


def _layers_open(pid: int) -> list[str]:
    """They are closed when they are flushed, some time later."""
    return [name for name in footprint(pid).files if "/layers/" in name]


def _settled(files: Counter[str]) -> Counter[str]:
    """Without file indexes: of some that are closed, Python collects the memory map later."""
    return Counter({name: count for name, count in files.items() if "/indexes/" not in name})


def _views(here: Instance) -> list[str]:
    """What is shown, by FUSE or by the kernel's EROFS."""
    return [*shown_in(here), *(path.name for path in here.state.glob("views/*"))]


def _mounted(here: Instance) -> list[Path]:
    return [Path(mount["target"]) for mount in here.status()["mounts"]]
