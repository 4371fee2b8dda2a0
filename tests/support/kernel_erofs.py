"""Mount an EROFS image file with the kernel, extra devices being plain files.

By fsopen(2) and its family, because the options of many devices do not fit mount(2)'s one page, and
because mount(8) insists on loop devices.
"""

from __future__ import annotations

import ctypes
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

_MOVE_MOUNT, _FSOPEN, _FSCONFIG, _FSMOUNT = 429, 430, 431, 432  # the same on every architecture
_SET_STRING, _CREATE = 1, 6
_CLOEXEC = 1
_READ_ONLY = 1
_EMPTY_PATH = 4
_AT_FDCWD = -100
_MNT_DETACH = 2

_libc = ctypes.CDLL(None, use_errno=True)


def _syscall(number: int, *arguments: int | bytes | None) -> int:
    converted = [ctypes.c_long(a) if isinstance(a, int) else ctypes.c_char_p(a) for a in arguments]
    result: int = _libc.syscall(ctypes.c_long(number), *converted)
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


@contextmanager
def mounted(image: Path, devices: Sequence[Path], target: Path) -> Iterator[Path]:
    """Mount `image` with `devices`, in order, on `target` while the context lasts."""
    context = _syscall(_FSOPEN, b"erofs", _CLOEXEC)
    try:
        _syscall(_FSCONFIG, context, _SET_STRING, b"source", os.fsencode(image), 0)
        for device in devices:
            _syscall(_FSCONFIG, context, _SET_STRING, b"device", os.fsencode(device), 0)
        _syscall(_FSCONFIG, context, _CREATE, None, None, 0)
        mount = _syscall(_FSMOUNT, context, _CLOEXEC, _READ_ONLY)
    finally:
        os.close(context)
    try:
        _syscall(_MOVE_MOUNT, mount, b"", _AT_FDCWD, os.fsencode(target), _EMPTY_PATH)
    finally:
        os.close(mount)
    try:
        yield target
    finally:
        if _libc.umount2(os.fsencode(target), _MNT_DETACH):
            raise OSError(ctypes.get_errno(), "cannot unmount", str(target))
