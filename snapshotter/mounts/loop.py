"""Loop devices: EROFS mounts for kernels that take no plain files (before 6.12).

Constants and structures are linux/loop.h's; LOOP_CONFIGURE, one call that makes all of a device or
nothing of it, is there since Linux 5.8.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from index.erofs.layout import BLOCK_SIZE
from snapshotter.mounts.erofs import mount_erofs
from snapshotter.mounts.errors import MountError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_CONTROL = "/dev/loop-control"
_CTL_GET_FREE = 0x4C82
_CONFIGURE = 0x4C0A

_READ_ONLY = 1
_AUTOCLEAR = 4
_DIRECT_IO = 16

# struct loop_config: fd, block_size; in it struct loop_info64, of which flags are all that is set:
# six 64-bit and three 32-bit numbers, flags, names and keys; then reserved.
_CONFIG = struct.Struct("=II 40x 12x I 176x 64x")

# Between the kernel's answer which device is free and our taking it, others may take it.
_ATTEMPTS = 64


def mount_erofs_on_loops(image: Path, devices: Sequence[Path], target: Path) -> None:
    """As `mount_erofs`, with a loop device for each file. They go when the mount does."""
    with ExitStack() as stack:
        blocks = [stack.enter_context(attached(path)) for path in (image, *devices)]
        mount_erofs(blocks[0], blocks[1:], target)


@contextmanager
def attached(path: Path) -> Iterator[Path]:
    """A read-only loop device that shows a file, with 512-byte blocks.

    It lasts as long as the block, or the last mount that was made of it. The file's own page cache
    is left out where its file system can. Raises MountError.
    """
    backing = _open(path, os.O_RDONLY)
    try:
        size = os.fstat(backing).st_size
        if size % BLOCK_SIZE:
            raise MountError(f"{path} has {size} bytes, which are not whole blocks")
        device, loop = _attach(backing, path)
    finally:
        os.close(backing)
    try:
        yield device
    finally:
        os.close(loop)


def _attach(backing: int, path: Path) -> tuple[Path, int]:
    """Take a free device. Returns its path and a descriptor that keeps it."""
    config = _CONFIG.pack(backing, BLOCK_SIZE, _READ_ONLY | _AUTOCLEAR | _DIRECT_IO)
    control = _open(Path(_CONTROL), os.O_RDWR)
    try:
        for _ in range(_ATTEMPTS):
            device = Path(f"/dev/loop{_call(control, _CTL_GET_FREE, 0, path)}")
            loop = _open(device, os.O_RDONLY)
            try:
                _call(loop, _CONFIGURE, config, path)
            except BaseException as error:
                os.close(loop)
                if isinstance(error, MountError) and error.errno == errno.EBUSY:
                    continue
                raise
            return device, loop
    finally:
        os.close(control)
    raise MountError(f"no loop device for {path}: others take each free one first")


def _call(descriptor: int, request: int, argument: int | bytes, path: Path) -> int:
    try:
        answer = fcntl.ioctl(descriptor, request, argument)
    except OSError as error:
        raise MountError(
            f"no loop device for {path}: {error.strerror}", errno=error.errno or 0
        ) from error
    return answer if isinstance(answer, int) else 0


def _open(path: Path, flags: int) -> int:
    try:
        return os.open(path, flags | os.O_CLOEXEC)
    except OSError as error:
        hint = ""
        if error.errno == errno.EACCES:
            hint = "run this as root"
        elif path.is_relative_to("/dev"):
            hint = "load the kernel module (modprobe loop), or give the container its devices"
        raise MountError(
            f"cannot open {path}: {error.strerror}", hint=hint, errno=error.errno or 0
        ) from error
