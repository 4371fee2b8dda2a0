"""Real loop devices: what they show, and that none stays."""

from __future__ import annotations

import errno
import os
import random
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from index.erofs.writer import write
from index.tree import Extent
from snapshotter.mounts import loop, syscalls
from snapshotter.mounts.errors import MountError, MountPointError
from snapshotter.mounts.loop import attached, mount_erofs_on_loops
from snapshotter.mounts.table import mount_at
from tests.support.nobody import as_nobody
from tests.support.serving import directory, packed, regular

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.root

PATIENCE = 20.0  # seconds; the kernel lets go of devices in the background
CONTENTS = {b"tool": random.Random(1).randbytes(70_000), b"data": b"x" * 513}


def devices_of(folder: Path) -> set[str]:
    """The loop devices that show files of a folder."""
    found = set()
    for path in Path("/sys/block").glob("loop*/loop/backing_file"):
        try:
            if path.read_text().startswith(f"{folder}/"):
                found.add(path.parts[3])
        except OSError:  # it went
            continue
    return found


def until(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A directory of which no loop device is left at the end."""
    yield tmp_path
    assert until(lambda: not devices_of(tmp_path)), f"left: {devices_of(tmp_path)}"


@pytest.fixture
def target(folder: Path) -> Iterator[Path]:
    path = folder / "target"
    path.mkdir()
    yield path
    while mount_at(path) is not None:
        syscalls.unmount(path, detach=True)


@pytest.fixture
def sample(folder: Path) -> tuple[Path, list[Path]]:
    files, raw = packed(CONTENTS)
    image, layer = folder / "image", folder / "layer"
    image.write_bytes(write(directory(files), [len(raw)]))
    layer.write_bytes(raw)
    return image, [layer]


def assert_shows_contents(root: Path) -> None:
    assert {os.fsencode(path.name): path.read_bytes() for path in root.iterdir()} == CONTENTS


def test_a_device_shows_a_file_read_only_while_the_block_lasts(folder: Path) -> None:
    file = folder / "file"
    file.write_bytes(random.Random(2).randbytes(512 * 37))
    with attached(file) as device:
        assert device.read_bytes() == file.read_bytes()
        with pytest.raises(OSError, match="Operation not permitted"):
            device.write_bytes(bytes(512))
    assert until(lambda: not devices_of(folder))


def test_an_image_is_mounted_and_its_devices_go_with_the_mount(
    sample: tuple[Path, list[Path]], folder: Path, target: Path
) -> None:
    mount_erofs_on_loops(*sample, target)
    assert_shows_contents(target)
    assert len(devices_of(folder)) == 2
    syscalls.unmount(target)
    assert until(lambda: not devices_of(folder))


def test_an_image_of_many_layers_has_as_many_devices(folder: Path, target: Path) -> None:
    layers = [bytes([number]) * 512 for number in range(20)]
    paths = [folder / f"layer-{number}" for number in range(20)]
    for path, layer in zip(paths, layers, strict=True):
        path.write_bytes(layer)
    files = {b"%d" % number: regular(512, Extent(0, number, 0, 512)) for number in range(20)}
    image = folder / "image"
    image.write_bytes(write(directory(files), [512] * 20))
    mount_erofs_on_loops(image, paths, target)
    assert len(devices_of(folder)) == 21
    for number, layer in enumerate(layers):
        assert (target / str(number)).read_bytes() == layer


def test_a_failed_mount_leaves_no_device(
    sample: tuple[Path, list[Path]], folder: Path, target: Path
) -> None:
    image, layers = sample
    with pytest.raises(MountError, match="makes no erofs"):
        mount_erofs_on_loops(layers[0], layers, target)
    with pytest.raises(MountError, match="makes no erofs"):
        mount_erofs_on_loops(image, layers * 2, target)
    with pytest.raises(MountPointError, match="No such file"):
        mount_erofs_on_loops(image, layers, target / "none")
    with pytest.raises(MountError, match=r"cannot open .*/none: No such file"):
        mount_erofs_on_loops(image, [*layers, folder / "none"], target)
    assert mount_at(target) is None
    assert until(lambda: not devices_of(folder))


def test_a_file_that_is_not_in_whole_blocks_is_refused(folder: Path) -> None:
    """A block device would hide its end."""
    file = folder / "file"
    file.write_bytes(bytes(513))
    with pytest.raises(MountError, match="513 bytes, which are not whole blocks"), attached(file):
        pass


def test_many_at_once_get_devices_of_their_own(folder: Path) -> None:
    files = [folder / f"file-{number}" for number in range(24)]
    for number, file in enumerate(files):
        file.write_bytes(bytes([number]) * 512)
    with ExitStack() as stack, ThreadPoolExecutor(8) as pool:
        contexts = [attached(file) for file in files]
        devices = list(pool.map(stack.enter_context, contexts))
        assert len(set(devices)) == 24
        assert [device.read_bytes() for device in devices] == [f.read_bytes() for f in files]


def test_a_device_that_others_take_first_is_left_to_them(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = folder / "file"
    file.write_bytes(bytes(512))
    ask = loop._call
    with attached(file) as taken:
        answers = iter([int(taken.name.removeprefix("loop"))] * 2)

        def call(descriptor: int, request: int, argument: int | bytes, path: Path) -> int:
            if request == loop._CTL_GET_FREE and (number := next(answers, None)) is not None:
                return number
            return ask(descriptor, request, argument, path)

        monkeypatch.setattr(loop, "_call", call)
        with attached(file) as device:
            assert device != taken
        answers = iter([int(taken.name.removeprefix("loop"))] * 1000)
        with pytest.raises(MountError, match="others take each free one first"), attached(file):
            pass


def test_a_machine_without_loop_devices_is_told_what_to_do(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = folder / "file"
    file.write_bytes(bytes(512))
    monkeypatch.setattr(loop, "_CONTROL", "/dev/no-loop-control")
    with pytest.raises(MountError, match="modprobe loop") as raised, attached(file):
        pass
    assert raised.value.errno == errno.ENOENT


def test_without_root_the_error_says_so() -> None:
    done = as_nobody(
        "try:\n"
        "    with attached(Path('/proc/self/status')): pass\n"
        "except MountError as error: print(error)\n",
        imports=(
            "from pathlib import Path\n"
            "from snapshotter.mounts.errors import MountError\n"
            "from snapshotter.mounts.loop import attached\n"
        ),
    )
    assert done.stdout.endswith("/dev/loop-control: Permission denied: run this as root\n")
