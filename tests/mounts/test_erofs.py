"""EROFS images in files, mounted by the real kernel."""

from __future__ import annotations

import errno
import os
import random
import re
import stat
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from index.erofs.writer import write
from index.tree import Extent
from snapshotter.mounts import syscalls
from snapshotter.mounts.erofs import mount_erofs, new_erofs
from snapshotter.mounts.errors import MountError, MountPointError
from snapshotter.mounts.syscalls import MountFlag
from snapshotter.mounts.table import mount_at, read_mounts
from tests.support.nobody import as_nobody
from tests.support.serving import MemoryLayer, directory, packed, regular, served, view_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from index.tree import Node

pytestmark = pytest.mark.root

BLOCK = 512
CONTENTS = {b"tool": random.Random(1).randbytes(70_000), b"empty": b"", b"data": b"x" * 513}


@pytest.fixture
def target(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "target"
    path.mkdir()
    yield path
    while mount_at(path) is not None:
        syscalls.unmount(path, detach=True)


def stored(folder: Path, tree: Node, layers: Sequence[bytes]) -> tuple[Path, list[Path]]:
    """An image of this tree in files: its own, and one a layer, of whole blocks."""
    image = folder / "image"
    image.write_bytes(write(tree, list(map(len, layers))))
    devices = []
    for number, layer in enumerate(layers):
        device = folder / f"layer-{number}"
        device.write_bytes(layer + bytes(-len(layer) % BLOCK))
        devices.append(device)
    return image, devices


@pytest.fixture
def sample(tmp_path: Path) -> tuple[Path, list[Path]]:
    """CONTENTS in one layer."""
    files, raw = packed(CONTENTS)
    files[b"tool"].mode = stat.S_IFREG | 0o4755
    return stored(tmp_path, directory(files), [raw])


def assert_shows_contents(folder: Path) -> None:
    assert {os.fsencode(path.name): path.read_bytes() for path in folder.iterdir()} == CONTENTS


@contextmanager
def unmounted(image: Path, devices: Sequence[Path]) -> Iterator[Path]:
    tree = new_erofs(image, devices)
    try:
        yield Path(f"/proc/self/fd/{tree}")
    finally:
        os.close(tree)


def open_files() -> list[str]:
    """What every descriptor of this process leads to."""
    folder = "/proc/self/fd"
    links = [os.path.join(folder, name) for name in os.listdir(folder)]
    return sorted(os.readlink(link) for link in links if os.path.lexists(link))


@pytest.fixture
def nothing_stays() -> Iterator[None]:
    before = open_files()
    yield
    assert open_files() == before


def test_every_file_reads_as_it_is_in_the_layers(
    sample: tuple[Path, list[Path]], target: Path
) -> None:
    mount_erofs(*sample, target)
    assert_shows_contents(target)


def test_the_mount_is_read_only_and_private_and_may_hold_setuid_programs(
    sample: tuple[Path, list[Path]], target: Path
) -> None:
    mount_erofs(*sample, target)
    entry = mount_at(target)
    assert entry is not None
    assert entry.kind == b"erofs"
    assert b"ro" in entry.options
    assert b"ro" in entry.super_options
    assert not {b"nosuid", b"nodev", b"noexec"} & set(entry.options)
    assert entry.optional == ()
    assert stat.S_IMODE((target / "tool").stat().st_mode) == 0o4755
    with pytest.raises(OSError, match="Read-only file system"):
        (target / "new").touch()


def test_an_image_can_have_many_layers(tmp_path: Path, target: Path) -> None:
    """More than the options of mount(2) have room for, which is one page."""
    layers = [bytes([number]) * BLOCK for number in range(200)]
    files = {
        f"file-{number}".encode(): regular(BLOCK, Extent(0, number, 0, BLOCK))
        for number in range(200)
    }
    image, devices = stored(tmp_path, directory(files), layers)
    mount_erofs(image, devices, target)
    for number in range(200):
        assert (target / f"file-{number}").read_bytes() == layers[number]


def test_paths_can_be_longer_than_an_option_of_the_kernel(
    tmp_path: Path, target: Path, nothing_stays: None
) -> None:
    folder = tmp_path.joinpath(*["a long name of a directory" * 5] * 4)
    folder.mkdir(parents=True)
    assert len(str(folder)) > syscalls.OPTION_MAX
    files, raw = packed(CONTENTS)
    mount_erofs(*stored(folder, directory(files), [raw]), target)
    assert_shows_contents(target)


def test_a_tree_that_is_mounted_nowhere_goes_with_its_descriptor(
    sample: tuple[Path, list[Path]], nothing_stays: None
) -> None:
    with unmounted(*sample) as root:
        assert_shows_contents(root)
        assert bytes(sample[0]) not in {entry.source for entry in read_mounts()}


def test_what_is_missing_is_named(sample: tuple[Path, list[Path]], nothing_stays: None) -> None:
    image, devices = sample
    for missing in ([devices[0].with_name("none")], [*devices, devices[0].with_name("none")]):
        with pytest.raises(MountError, match=r"cannot open .*/none: No such file") as raised:
            new_erofs(image, missing)
        assert raised.value.errno == errno.ENOENT


def test_as_many_files_as_the_image_has_layers_are_needed(
    sample: tuple[Path, list[Path]], nothing_stays: None
) -> None:
    image, devices = sample
    with pytest.raises(MountError, match=r"makes no erofs: Invalid argument: .*dmesg") as raised:
        new_erofs(image, devices * 2)
    assert raised.value.errno == errno.EINVAL


def test_a_file_that_is_no_image_is_refused(
    sample: tuple[Path, list[Path]], nothing_stays: None
) -> None:
    _, devices = sample
    with pytest.raises(MountError, match="makes no erofs: Invalid argument"):
        new_erofs(devices[0], devices)


def test_a_layer_that_is_not_in_whole_blocks_is_refused(
    sample: tuple[Path, list[Path]], nothing_stays: None
) -> None:
    """Its last block cannot be relied on: some kernels fail to read it."""
    image, devices = sample
    os.truncate(devices[0], os.path.getsize(devices[0]) - 1)
    with pytest.raises(MountError, match=r"layer-0 has \d+ bytes, which are not whole blocks"):
        new_erofs(image, devices)


def test_an_image_on_tmpfs_is_refused_with_the_reason(
    sample: tuple[Path, list[Path]], target: Path
) -> None:
    syscalls.mount("test", target, "tmpfs", MountFlag(0), "size=1m")
    image = target / "image"
    image.write_bytes(sample[0].read_bytes())
    with pytest.raises(MountError, match=r"Block device required: .*not on tmpfs") as raised:
        new_erofs(image, sample[1])
    assert raised.value.errno == errno.ENOTBLK


def test_a_layer_may_be_on_tmpfs(sample: tuple[Path, list[Path]], target: Path) -> None:
    syscalls.mount("test", target, "tmpfs", MountFlag(0), "size=1m")
    layer = target / "layer"
    layer.write_bytes(sample[1][0].read_bytes())
    with unmounted(sample[0], [layer]) as root:
        assert_shows_contents(root)


def test_nothing_is_mounted_where_the_directory_is_missing(
    sample: tuple[Path, list[Path]], target: Path, nothing_stays: None
) -> None:
    with pytest.raises(MountPointError, match=r"cannot mount at .*/none: No such file"):
        mount_erofs(*sample, target / "none")


def test_without_root_the_error_says_so(sample: tuple[Path, list[Path]]) -> None:
    done = as_nobody(
        "try: syscalls.new_tree('erofs', [('source', '/none')], ['ro'])\n"
        "except MountError as error: print(error)\n",
        imports=(
            "from snapshotter.mounts import syscalls\n"
            "from snapshotter.mounts.errors import MountError\n"
        ),
    )
    assert done.stdout == "no permission to make erofs: run this as root\n"


def test_the_kernels_own_words_are_told(nothing_stays: None) -> None:
    with pytest.raises(
        MountError, match=r"no erofs with colour=red: erofs: Unknown parameter 'colour'"
    ) as raised:
        syscalls.new_tree("erofs", [("colour", "red")], ["ro"])
    assert raised.value.errno == errno.EINVAL


def test_a_file_system_that_the_kernel_has_not_is_named() -> None:
    with pytest.raises(MountError, match="no file system nosuchfs: load it: modprobe nosuchfs"):
        syscalls.new_tree("nosuchfs", [])


def test_an_image_can_be_mounted_from_files_that_this_process_serves(
    sample: tuple[Path, list[Path]], tmp_path: Path, target: Path
) -> None:
    """Through FUSE, for instance; then reads that fail are errors, and are not remembered."""
    image, devices = sample
    files, raw = packed({b"image": image.read_bytes()})
    layer = devices[0].read_bytes()
    files[b"layer"] = regular(len(layer), Extent(0, 1, 0, len(layer)))
    source = MemoryLayer(layer, local=False, failing=True)
    fs = tmp_path / "fs"
    fs.mkdir()
    with served(fs, view_of(directory(files), [MemoryLayer(raw), source])):
        mount_erofs(fs / "image" / "image", [fs / "image" / "layer"], target)
        try:
            assert {path.name for path in target.iterdir()} == {"tool", "empty", "data"}
            with pytest.raises(OSError, match=re.escape(os.strerror(errno.EIO))):
                (target / "tool").read_bytes()
            source.failing = False
            assert_shows_contents(target)
        finally:
            syscalls.unmount(target, detach=True)


def test_direct_reads_give_the_same_bytes_wherever_files_lie(tmp_path: Path, target: Path) -> None:
    raw = random.Random(2).randbytes(40 * BLOCK)
    files = {
        f"{start}-{size}".encode(): regular(size, Extent(0, 0, start * BLOCK, size))
        for start in (0, 1, 7, 8, 31)
        for size in (1, BLOCK, 8 * BLOCK - 1, 9 * BLOCK)
    }
    image, layer = tmp_path / "image", tmp_path / "layer"
    image.write_bytes(write(directory(files), [len(raw)]))
    layer.write_bytes(raw)
    mount_erofs(image, [layer], target, direct=True)
    for name, node in files.items():
        start = node.extents[0].raw_offset
        assert (target / os.fsdecode(name)).read_bytes() == raw[start : start + node.size]
