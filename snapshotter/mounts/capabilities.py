"""What this kernel can do for images, found out by doing it with a tiny one.

Version numbers tell little: distributions add and leave out, and a container may have no loop
devices. What is tried is read back and compared, and nothing of it stays.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
import tempfile
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from index.erofs.layout import BLOCK_SIZE
from index.erofs.writer import write
from index.errors import FirstByteError
from index.tree import Extent, Node
from snapshotter.mounts import syscalls
from snapshotter.mounts.erofs import mount_erofs, new_erofs
from snapshotter.mounts.errors import MountError
from snapshotter.mounts.loop import mount_erofs_on_loops
from snapshotter.mounts.table import read_mounts

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    Mounter = Callable[[Path, Sequence[Path], Path], None]

MANY_LAYERS = 512
"""The most layers that are tried; tools that build images stop at 127."""

SAMPLE_LAYER = bytes(range(256)) * 32
"""Raw space of the sample's layer: two pages that are no zeros."""

_NAME = "file"
_PREFIX = "probe-"  # starts the names of directories in which the kernel is tried


@dataclass(frozen=True, slots=True)
class Sample:
    """A tiny image in files: its EROFS image (`sample_image`), and its layer (`SAMPLE_LAYER`)."""

    image: Path
    layer: Path


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What works, as reasons why it does not: one line each, empty for what works.

    `file_backed`: EROFS from plain files of the store; `direct`: without their page cache, on this
    disk. `fuse_backed`: from files of our own FUSE
    mount. `loop`: through loop devices. `overlay`: a container's writable layer in the store, above
    an image.

    `failed_reads`: a read of a plain file that fails half-way is an error. Kernels before 7.0, and
    their stable branches for some time, show zeros for the other half, and go on doing so. Where
    this has a reason, nothing whose reads can fail may be mounted from plain files. The change that
    ended it came to Linux 7.0 and to all stable branches after the one without which direct reads
    crash now and then (CVE-2026-23224): `direct` is not tried without it, and has the same reason.

    `layers` is how many layers were seen to work in one image, up to MANY_LAYERS.
    """

    file_backed: str
    direct: str
    fuse_backed: str
    loop: str
    overlay: str
    failed_reads: str
    layers: int


def sample_image(layers: int = 1, start: int = 0) -> bytes:
    """An image whose one file is all of the last layer but its first `start` bytes; each layer has
    the size of SAMPLE_LAYER."""
    extent = Extent(0, layers - 1, start, len(SAMPLE_LAYER) - start)
    file = Node(stat.S_IFREG | 0o444, size=extent.length, extents=(extent,))
    root = Node(stat.S_IFDIR | 0o755, nlink=2, children={_NAME.encode(): file})
    return write(root, [len(SAMPLE_LAYER)] * layers)


def probe(store: Path, served: Sample | None) -> Capabilities:
    """Try everything, in a temporary directory in `store`.

    `served` is the sample in our FUSE mount; without it, files there are not tried. Call this from
    a worker thread, for some of the calls ask the FUSE mount. Raises nothing for what does not
    work, and OSError if `store` cannot be written to.
    """
    with tempfile.TemporaryDirectory(prefix=_PREFIX, dir=store) as name:
        folder = Path(name)
        stored = Sample(folder / "image", folder / "layer")
        stored.image.write_bytes(sample_image())
        stored.layer.write_bytes(SAMPLE_LAYER)
        target = folder / "mount"
        target.mkdir()
        file_backed = _try(stored, mount_erofs, target)
        loop = _try(stored, mount_erofs_on_loops, target)
        mount = mount_erofs_on_loops if file_backed else mount_erofs
        failed_reads = file_backed or _reason(lambda: _read_half(folder))
        return Capabilities(
            file_backed=file_backed,
            direct=failed_reads or _reason(lambda: _read_direct(folder)),
            fuse_backed=_try(served, mount_erofs, target) if served else "not tried",
            loop=loop,
            overlay=(file_backed and loop) or _try_overlay(stored, mount, target),
            failed_reads=failed_reads,
            layers=0 if file_backed else _count_layers(folder, stored.layer),
        )


def left_behind(store: Path) -> list[Path]:
    """Where the kernel was being tried when a daemon was killed. For when nobody is trying it."""
    return sorted(store.glob(_PREFIX + "*"))


def remove_left_behind(folder: Path) -> None:
    """Unmount what `left_behind` has found, and remove it. Raises MountError and OSError.

    Reads that are under way in such a mount are waited for, and nothing ends that wait: call this
    from a worker thread, when our FUSE mount, which they may ask, is being served.
    """
    inside = bytes(folder.resolve()) + b"/"
    for entry in reversed(read_mounts()):  # what lies on top first
        if entry.point.startswith(inside):
            syscalls.unmount(Path(os.fsdecode(entry.point)), detach=True)
    shutil.rmtree(folder)


def _reason(attempt: Callable[[], None]) -> str:
    """Why an attempt fails, in one line; empty if it does not."""
    try:
        attempt()
    except FirstByteError as error:
        return str(error)
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _try(sample: Sample, mount: Mounter, target: Path) -> str:
    def attempt() -> None:
        with _mounted(sample, mount, target):
            _compare((target / _NAME).read_bytes())

    return _reason(attempt)


def _try_overlay(sample: Sample, mount: Mounter, target: Path) -> str:
    upper, work = target.with_name("upper"), target.with_name("work")
    upper.mkdir()
    work.mkdir()

    def attempt() -> None:
        with _mounted(sample, mount, target), ExitStack() as stack:
            options = []
            for key, path in (("lowerdir", target), ("upperdir", upper), ("workdir", work)):
                # By descriptor, because a path may hold what separates directories here.
                descriptor = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
                stack.callback(os.close, descriptor)
                options.append((key, f"/proc/self/fd/{descriptor}"))
            tree = syscalls.new_tree("overlay", options)
            stack.callback(os.close, tree)
            file = Path(f"/proc/self/fd/{tree}") / _NAME
            _compare(file.read_bytes())
            file.unlink()  # leaves a whiteout, which not all file systems can hold
            file.write_bytes(SAMPLE_LAYER)
            _compare(file.read_bytes())

    return _reason(attempt)


@contextmanager
def _mounted(sample: Sample, mount: Mounter, target: Path) -> Iterator[None]:
    mount(sample.image, [sample.layer], target)
    try:
        yield
    finally:
        syscalls.unmount(target, detach=True)


def _compare(found: bytes, start: int = 0) -> None:
    if found != SAMPLE_LAYER[start:]:
        raise MountError("a file was read back with other bytes")


def _read_half(folder: Path) -> None:
    """Read a file whose layer ends in its middle: the simplest read that fails half-way."""
    layer = folder / "half"
    layer.write_bytes(SAMPLE_LAYER[: len(SAMPLE_LAYER) // 2])
    try:
        _read(folder / "image", [layer])
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        return
    raise MountError(
        f"Linux {os.uname().release} shows zeros where a read of an EROFS' file fails half-way",
        hint="Linux 7.0 does not, nor do recent stable releases",
    )


def _read_direct(folder: Path) -> None:
    """Read as most files lie: on a block's boundary, which is no page's and may be no sector's."""
    image = folder / "shifted"
    image.write_bytes(sample_image(start=BLOCK_SIZE))
    _compare(_read(image, [folder / "layer"], direct=True), BLOCK_SIZE)


def _count_layers(folder: Path, layer: Path) -> int:
    """The layers that one image can have: as many as are tried, or half, or a quarter …"""
    image = folder / "many"

    def attempt(count: int) -> None:
        image.write_bytes(sample_image(count))
        _compare(_read(image, [layer] * count))

    count = MANY_LAYERS
    while count and _reason(partial(attempt, count)):
        count //= 2
    return count


def _read(image: Path, layers: Sequence[Path], *, direct: bool = False) -> bytes:
    """What the sample's file holds, without a place in the tree of mounts."""
    tree = new_erofs(image, layers, direct=direct)
    try:
        return (Path(f"/proc/self/fd/{tree}") / _NAME).read_bytes()
    finally:
        os.close(tree)
