"""What a start has read of an unpacked image: what of its files is in the page cache afterwards.

Source: mincore(2). Includes what the kernel read ahead, as a start from a local disk does.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import stat
import zlib
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_LEVEL = 6  # of gzip, what image builders use
_PIECE = 1 << 20

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p)
_FAILED = ctypes.c_void_p(-1).value


class Touched(msgspec.Struct, frozen=True):
    """`compressed_bytes` is what gzip makes of these `bytes` of that many `files`, in one piece."""

    files: int
    bytes: int
    compressed_bytes: int


def touched(trees: Iterable[Path]) -> Touched:
    """What of all files in these trees the kernel has in memory."""
    compressor = zlib.compressobj(_LEVEL)
    files = size = compressed = 0
    for path in _files(trees):
        ranges = resident(path)
        files += bool(ranges)
        with path.open("rb", buffering=0) as file:
            for start, end in ranges:
                for piece in _pieces(file.fileno(), start, end):
                    size += len(piece)
                    compressed += len(compressor.compress(piece))
    return Touched(files, size, compressed + len(compressor.flush()))


def resident(path: Path) -> list[tuple[int, int]]:
    """The ranges of a file's bytes that are in memory, in order."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        size = os.fstat(descriptor).st_size
        if not size:
            return []
        pages = -(-size // mmap.PAGESIZE)
        address = _libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)
        if address == _FAILED:
            raise OSError(ctypes.get_errno(), "mmap", str(path))
        try:
            found = ctypes.create_string_buffer(pages)
            if _libc.mincore(address, size, found):
                raise OSError(ctypes.get_errno(), "mincore", str(path))
        finally:
            _libc.munmap(address, size)
    finally:
        os.close(descriptor)
    ranges, position = [], 0
    for inside, run in groupby(byte & 1 for byte in found.raw):
        end = position + sum(1 for _ in run)
        if inside:
            ranges.append((position * mmap.PAGESIZE, min(end * mmap.PAGESIZE, size)))
        position = end
    return ranges


def _files(trees: Iterable[Path]) -> Iterator[Path]:
    for tree in trees:
        for folder, _, names in os.walk(tree):
            for name in names:
                path = Path(folder, name)
                if stat.S_ISREG(path.lstat().st_mode):
                    yield path


def _pieces(descriptor: int, start: int, end: int) -> Iterator[bytes]:
    while start < end and (piece := os.pread(descriptor, min(_PIECE, end - start), start)):
        start += len(piece)
        yield piece
