"""EROFS mounts by the kernel: an image's tree, and the files of the layers that it points into.

The kernel reads plain files since 6.12; before, all of them have to be block devices (`loop`). It
needs more of a file system than shared memory gives, so an image on tmpfs is refused (a layer is
not). ext4 does not expect the way in which EROFS reads it: kernels with CONFIG_EXT4_DEBUG log a
warning, once a boot (`ext4_check_map_extents_env`, seen on 6.18).

Not used, because they were measured (Linux 6.18):

- The option `directio`. It keeps the files' pages out of memory, where now there are two of each.
  But 4 000 small files that lie one behind the other took 4 000 FUSE requests and not 38: what is
  read ahead then ends with the file. Besides, it crashes kernels that lack a fix of 2026
  (CVE-2026-23224).
- More read-ahead for EROFS, by /sys/class/bdi. Above FUSE, which reads 1 MiB ahead, the default of
  128 KiB gives 1.6 GB/s in order and 4 MiB give 0.4 GB/s for 3.5 times the processor time; above
  ext4 it makes no difference.
"""

from __future__ import annotations

import errno
import os
import stat
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from index.erofs.layout import BLOCK_SIZE
from snapshotter.mounts import syscalls
from snapshotter.mounts.errors import MountError

if TYPE_CHECKING:
    from collections.abc import Sequence


def mount_erofs(image: Path, devices: Sequence[Path], target: Path) -> None:
    """Mount an EROFS image, read-only and private, at the directory `target`.

    `devices` are the raw spaces of the layers, in the order of the image's device table. They and
    the image are all files or all block devices, of whole blocks, and the kernel keeps them open.
    It reads the image before this returns: call it from a worker thread if this process serves it.

    Raises MountError; nothing is mounted then.
    """
    tree = new_erofs(image, devices)
    try:
        syscalls.attach(tree, target)
    finally:
        os.close(tree)
    syscalls.make_private(target)


def new_erofs(image: Path, devices: Sequence[Path]) -> int:
    """As `mount_erofs`, but mounted nowhere: a descriptor of its root, as `new_tree` gives it."""
    with ExitStack() as stack:
        options = [("source", _option(image, stack))]
        options += [("device", _option(device, stack)) for device in devices]
        try:
            return syscalls.new_tree("erofs", options, read_only=True)
        except MountError as error:
            error.hint = error.hint or _hint(error.errno)
            raise


def _option(path: Path, stack: ExitStack) -> Path:
    """The path of a file, or another one that is short enough for the kernel's mount options."""
    try:
        status = os.stat(path)
        if stat.S_ISREG(status.st_mode) and status.st_size % BLOCK_SIZE:
            # Kernels fill up with zeros what a file's last block lacks, or fail to read it at all.
            raise MountError(f"{path} has {status.st_size} bytes, which are not whole blocks")
        if len(os.fsencode(path)) <= syscalls.OPTION_MAX:
            return path
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError as error:
        raise MountError(f"cannot open {path}: {error.strerror}", errno=error.errno or 0) from error
    stack.callback(os.close, descriptor)
    return Path(f"/proc/self/fd/{descriptor}")


def _hint(number: int) -> str:
    if number == errno.ENOTBLK:
        return "EROFS from plain files needs Linux 6.12, and an image that is not on tmpfs"
    return "the kernel's log says more (dmesg)" if number == errno.EINVAL else ""
