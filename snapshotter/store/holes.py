"""Holes in files: how a part of a sparse file is given back to the disk."""

from __future__ import annotations

import ctypes
import os
from itertools import groupby
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate64.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)

# linux/falloc.h
_KEEP_SIZE = 1
_PUNCH_HOLE = 2


def punch_hole(descriptor: int, offset: int, length: int) -> None:
    """Give a range of an open file back to the disk; it reads as zeros then. Blocks.

    Raises OSError; EOPNOTSUPP where the file system cannot (ext4, xfs, btrfs, tmpfs can).
    """
    mode = _PUNCH_HOLE | _KEEP_SIZE
    if _libc.fallocate64(descriptor, mode, offset, length):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def runs(numbers: Iterable[int]) -> Iterator[range]:
    """Ascending numbers as ranges without gaps."""
    for _, group in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):
        members = [number for _, number in group]
        yield range(members[0], members[-1] + 1)


def allocated(descriptor: int) -> Iterator[tuple[int, int]]:
    """Offset and end of each part of a file that is no hole, as lseek(2) finds them."""
    end = 0
    size = os.fstat(descriptor).st_size
    while end < size:
        try:
            start = os.lseek(descriptor, end, os.SEEK_DATA)
        except OSError:  # ENXIO: there are only holes from here on
            return
        end = os.lseek(descriptor, start, os.SEEK_HOLE)
        yield start, end
