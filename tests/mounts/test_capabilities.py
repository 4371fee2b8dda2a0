"""What a kernel can do is found out by doing it; here with this one, and with ones made worse."""

from __future__ import annotations

import errno
import os
from contextlib import chdir
from typing import TYPE_CHECKING

import pytest

from index.erofs.reader import Image
from index.tree import Extent
from snapshotter.mounts import capabilities, syscalls
from snapshotter.mounts.capabilities import (
    MANY_LAYERS,
    SAMPLE_LAYER,
    Capabilities,
    Sample,
    left_behind,
    probe,
    remove_left_behind,
    sample_image,
)
from snapshotter.mounts.erofs import mount_erofs, new_erofs
from snapshotter.mounts.errors import MountError
from snapshotter.mounts.loop import mount_erofs_on_loops
from snapshotter.mounts.syscalls import MountFlag
from snapshotter.mounts.table import read_mounts
from tests.support.erofs_trees import read
from tests.support.serving import MemoryLayer, directory, packed, regular, served, view_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from snapshotter.mounts.capabilities import Mounter

pytestmark = pytest.mark.root

ALL = Capabilities(
    file_backed="",
    direct="",
    fuse_backed="",
    loop="",
    overlay="",
    failed_reads="",
    layers=MANY_LAYERS,
)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Path]:
    """A directory with an awkward name, of which nothing may be left in use."""
    path = tmp_path / "a store: with,commas"
    path.mkdir()
    yield path
    assert os.listdir(path) == []
    assert not [entry for entry in read_mounts() if entry.point.startswith(bytes(path))]
    targets = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
    assert not [name for name in targets if os.path.realpath(name).startswith(str(path))]


def refuse(image: Path, devices: Sequence[Path], target: Path | None = None) -> int:
    raise MountError("no such luck", hint="buy another kernel", errno=errno.ENOTBLK)


@pytest.mark.parametrize("layers", [1, 7])
def test_the_sample_is_an_image_of_one_file_in_its_last_layer(layers: int) -> None:
    image = Image(sample_image(layers))
    nid = image.lookup(image.root, b"file")
    assert nid is not None
    raw = [b""] * (layers - 1) + [SAMPLE_LAYER]
    assert read(image, raw, nid, 0, len(SAMPLE_LAYER)) == SAMPLE_LAYER


def test_this_machine_can_do_everything(store: Path, tmp_path: Path) -> None:
    fs = tmp_path / "fs"
    fs.mkdir()
    files, raw = packed({b"image": sample_image()})
    files[b"layer"] = regular(len(SAMPLE_LAYER), Extent(0, 1, 0, len(SAMPLE_LAYER)))
    view = view_of(directory(files), [MemoryLayer(raw), MemoryLayer(SAMPLE_LAYER, local=False)])
    with served(fs, view):
        assert probe(store, Sample(fs / "image" / "image", fs / "image" / "layer")) == ALL


def test_a_fuse_mount_that_fails_or_lies_is_the_reason(store: Path, tmp_path: Path) -> None:
    fs = tmp_path / "fs"
    fs.mkdir()
    files, raw = packed({b"image": sample_image(), b"wrong": bytes(len(SAMPLE_LAYER))})
    files[b"failing"] = regular(len(SAMPLE_LAYER), Extent(0, 1, 0, len(SAMPLE_LAYER)))
    failing = MemoryLayer(SAMPLE_LAYER, local=False, failing=True)
    folder = fs / "image"
    with served(fs, view_of(directory(files), [MemoryLayer(raw), failing])):

        def reason(layer: str) -> str:
            return probe(store, Sample(folder / "image", folder / layer)).fuse_backed

        assert reason("wrong") == "a file was read back with other bytes"
        assert reason("failing") == os.strerror(errno.EIO)
        assert reason("none") == f"cannot open {folder}/none: No such file or directory"


def test_what_is_not_asked_for_is_not_tried(store: Path) -> None:
    assert probe(store, None).fuse_backed == "not tried"


def test_a_kernel_that_wants_block_devices_has_loop_devices_and_overlays(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(capabilities, "mount_erofs", refuse)
    reason = "no such luck: buy another kernel"
    found = probe(store, None)
    assert (found.file_backed, found.failed_reads) == (reason, reason)
    assert found.layers == 0
    assert (found.loop, found.overlay) == ("", "")


def test_without_any_mount_there_is_no_overlay(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(capabilities, "mount_erofs", refuse)
    monkeypatch.setattr(capabilities, "mount_erofs_on_loops", refuse)
    found = probe(store, None)
    assert found.overlay == found.loop == "no such luck: buy another kernel"


def test_an_overlay_that_is_refused_has_the_kernels_reason(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = syscalls.new_tree
    monkeypatch.setattr(
        syscalls,
        "new_tree",
        lambda kind, options, flags=(): make(
            kind if kind != "overlay" else "nosuchfs", options, flags
        ),
    )
    found = probe(store, None)
    assert found.overlay == "this kernel has no file system nosuchfs: load it: modprobe nosuchfs"
    assert found.file_backed == ""


def test_a_kernel_that_shows_zeros_for_failed_reads_is_found_out(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Linux before 7.0, by which half of a file is taken for all of it."""

    def show_zeros(image: Path, devices: Sequence[Path], *, direct: bool = False) -> int:
        assert not direct  # it may crash such a kernel
        half = devices[0].stat().st_size < len(SAMPLE_LAYER)
        if half:
            os.truncate(devices[0], len(SAMPLE_LAYER))
        return new_erofs(image, devices)

    monkeypatch.setattr(capabilities, "new_erofs", show_zeros)
    found = probe(store, None)
    assert found.failed_reads.startswith(f"Linux {os.uname().release} shows zeros where a read of ")
    assert found.direct == found.failed_reads
    assert found.layers == MANY_LAYERS


def test_direct_reads_that_the_disk_refuses_are_found_out(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk of 4096-byte sectors, say: files begin at multiples of 512."""

    def refuse_direct(image: Path, devices: Sequence[Path], *, direct: bool = False) -> int:
        return refuse(image, devices) if direct else new_erofs(image, devices)

    monkeypatch.setattr(capabilities, "new_erofs", refuse_direct)
    found = probe(store, None)
    assert (found.file_backed, found.failed_reads) == ("", "")
    assert found.direct == "no such luck: buy another kernel"


def test_direct_reads_are_tried_where_no_page_begins(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def note(image: Path, devices: Sequence[Path], *, direct: bool = False) -> int:
        if direct:
            tried.append(Image(image.read_bytes()))
        return new_erofs(image, devices, direct=direct)

    monkeypatch.setattr(capabilities, "new_erofs", note)
    assert probe(store, None).direct == ""
    (image,) = tried
    nid = image.lookup(image.root, b"file")
    assert nid is not None
    (piece,) = image.map(nid, 0, 1)
    assert piece.offset % 4096 == 512


def test_the_number_of_layers_is_one_that_was_seen_to_work(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def at_most_100(image: Path, devices: Sequence[Path], *, direct: bool = False) -> int:
        return new_erofs(image, devices) if len(devices) <= 100 else refuse(image, devices)

    monkeypatch.setattr(capabilities, "new_erofs", at_most_100)
    assert probe(store, None).layers == 64


def test_a_mount_with_other_bytes_does_not_count(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mount_zeros(image: Path, devices: Sequence[Path], target: Path) -> None:
        zeros = image.with_name("zeros")
        zeros.write_bytes(bytes(len(SAMPLE_LAYER)))
        mount_erofs(image, [zeros], target)

    monkeypatch.setattr(capabilities, "mount_erofs", mount_zeros)
    assert probe(store, None).file_backed == "a file was read back with other bytes"


@pytest.mark.parametrize("mount", [mount_erofs, mount_erofs_on_loops])
def test_what_is_left_by_one_that_was_killed_is_removed(store: Path, mount: Mounter) -> None:
    """With all that it had mounted, on top of each other; what others have in the store stays."""
    folder, other = store / "probe-left", store / "layers"
    for name in ("mount", "upper", "work"):
        (folder / name).mkdir(parents=True)
    other.mkdir()
    image, layer, target = folder / "image", folder / "layer", folder / "mount"
    image.write_bytes(sample_image())
    layer.write_bytes(SAMPLE_LAYER)
    mount(image, [layer], target)
    with chdir(folder):  # an overlay's options are separated by what is in the store's name
        options = "lowerdir=mount,upperdir=upper,workdir=work"
        syscalls.mount("overlay", target, "overlay", MountFlag(0), options)
    (target / "file").unlink()
    mount(image, [layer], target)
    assert left_behind(store) == [folder]
    with (target / "file").open("rb"):  # by somebody who looks around
        remove_left_behind(folder)
    assert left_behind(store) == []
    assert os.listdir(store) == ["layers"]
    other.rmdir()


def test_nothing_is_removed_that_is_still_mounted(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = store / "probe-left"
    shown = store / "shown"
    for path in (folder / "mount", shown):
        path.mkdir(parents=True)
    (shown / "file").write_bytes(SAMPLE_LAYER)
    syscalls.bind(shown, folder / "mount")

    def unmount(target: Path, *, detach: bool) -> None:
        raise MountError(f"cannot unmount {target}")

    with monkeypatch.context() as patched:
        patched.setattr(syscalls, "unmount", unmount)
        with pytest.raises(MountError):
            remove_left_behind(folder)
    assert (shown / "file").read_bytes() == SAMPLE_LAYER
    remove_left_behind(folder)
    assert (shown / "file").read_bytes() == SAMPLE_LAYER
    (shown / "file").unlink()
    shown.rmdir()


def test_a_store_that_cannot_be_written_to_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        probe(tmp_path / "none", None)
