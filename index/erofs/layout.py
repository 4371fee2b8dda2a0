"""EROFS on disk: the records of an image's tree, as FirstByte writes and reads them.

All numbers are little-endian. Source: `fs/erofs/erofs_fs.h` of Linux 6.18 and
`Documentation/filesystems/erofs.rst`. Only what a metadata-only image of 512-byte blocks needs is
here: extended inodes, flat, inline and chunk-based data, inline and shared xattrs. The superblock
and the device table are in `superblock`.

An inode's number (nid) is its position: it starts at `meta_block * 512 + nid * 32`. After its 64
bytes come the xattr body, then either the inline tail or, 8-byte aligned, the chunk indices.
"""

from __future__ import annotations

import stat
import struct

BLOCK_BITS = 9
BLOCK_SIZE = 1 << BLOCK_BITS
"""Bytes in a block: tar's own unit, so that every file of a tar starts on a block."""

SLOT_SIZE = 32
"""Bytes that an inode number counts."""

NANOSECONDS = 1_000_000_000

# Inode, 64 bytes
#
#   offset size field
#   0      2    format: bit 0 = 1 (extended), bits 1-3 data layout
#   2      2    xattr count: 0 none, else the body has 12 + 4 * (count - 1) bytes
#   4      2    mode, as in stat(2)
#   6      2    reserved
#   8      8    size in bytes
#   16     4    start block (flat, inline), device number (devices), chunk format (chunk-based)
#   20     4    32-bit inode number; the kernel does not use it, 0 compresses best
#   24     4    uid
#   28     4    gid
#   32     8    mtime, seconds since the epoch, signed
#   40     4    mtime, nanoseconds
#   44     4    link count
#   48     16   reserved
INODE = struct.Struct("<HHH2xQI4xIIqII16x")
INODE_HEAD = struct.Struct("<HHH2xQI")
"""The first five fields, for those who need no more."""

FORMAT_FLAT = 1 | 0 << 1
"""Data in whole blocks from the start block on."""
FORMAT_INLINE = 1 | 2 << 1
"""As flat, but what is left after the last whole block follows the inode, inside one block."""
FORMAT_CHUNKED = 1 | 4 << 1
"""Data where the chunk indices say."""

# Chunk index, 8 bytes. A chunk is 2 ** (chunk format & 31) blocks.
#
#   offset size field
#   0      2    high bits of the block, 0 here
#   2      2    device: 0 the image itself, k the device table's slot k - 1
#   4      4    block in the device; HOLE: zeros
CHUNK_INDEX = struct.Struct("<HHI")
CHUNK_WITH_DEVICE = 0x20
"""Chunk format flag: 8-byte indices as above. The low five bits are log2(blocks in a chunk)."""
CHUNK_BITS_MASK = 0x1F
HOLE = 0xFFFF_FFFF

# A regular file that lies in one piece, without xattrs: most inodes of an image. Inode, one chunk
# index, and zeros up to the next inode.
WHOLE_FILE = struct.Struct("<HHH2xQI4xIIqII16x HHI 24x")
WHOLE_FILE_CHUNKS = CHUNK_WITH_DEVICE | CHUNK_BITS_MASK
WHOLE_FILE_MAX = BLOCK_SIZE << CHUNK_BITS_MASK
"""Bytes that the largest chunk can hold: 1 TiB."""

# Directory entry, 12 bytes. A directory block is an array of them and then their names; the first
# name offset tells how many. The last name ends at the block's or directory's end, or at a NUL.
#
#   offset size field
#   0      8    inode number
#   8      2    offset of the name in this block
#   10     1    type
#   11     1    reserved
DIRENT = struct.Struct("<QHBx")
NAME_MAX = 255

DTYPES: dict[int, int] = {
    stat.S_IFREG: 1,
    stat.S_IFDIR: 2,
    stat.S_IFCHR: 3,
    stat.S_IFBLK: 4,
    stat.S_IFIFO: 5,
    stat.S_IFSOCK: 6,
    stat.S_IFLNK: 7,
}
"""Type of a directory entry by the type bits of its inode's mode."""

SYMLINK_MAX = 4095
"""Bytes of a symlink's target: PATH_MAX without its NUL; the kernel truncates longer ones."""

# Xattr body, 12 bytes, then the shared ids (4 bytes each), then the inline entries.
#
#   offset size field
#   0      4    name filter, used only with a feature that we do not set
#   4      1    shared ids
#   5      7    reserved
XATTR_BODY = struct.Struct("<4xB7x")
XATTR_SHARED_ID = struct.Struct("<I")
XATTR_SHARED_MAX = 255
XATTR_UNIT = 4
"""Bytes that the count in the inode and the shared ids count; entries start at multiples of it."""
XATTR_BODY_MAX = XATTR_BODY.size + XATTR_UNIT * (0xFFFF - 1)

# Xattr entry, 4 bytes, then the name without its prefix, the value, and zeros up to a multiple of
# 4 bytes.
#
#   offset size field
#   0      1    bytes of the name
#   1      1    prefix
#   2      2    bytes of the value
XATTR_ENTRY = struct.Struct("<BBH")
XATTR_NAME_MAX = 255
"""XATTR_NAME_MAX of Linux: bytes of a whole name, its prefix included."""
XATTR_VALUE_MAX = 0xFFFF

XATTR_PREFIXES: dict[int, bytes] = {
    1: b"user.",
    2: b"system.posix_acl_access",
    3: b"system.posix_acl_default",
    4: b"trusted.",
    6: b"security.",
}
XATTR_WHOLE_NAMES = frozenset((2, 3))
"""Prefixes that are a name by themselves: nothing follows them. Something follows all others."""


def xattr_body_size(count: int) -> int:
    """Bytes of the xattr body of an inode with this xattr count."""
    return XATTR_BODY.size + XATTR_UNIT * (count - 1) if count else 0


def align(offset: int, unit: int) -> int:
    """The first multiple of `unit` at or after `offset`."""
    return -(-offset // unit) * unit


MAJOR_MAX = 0xFFF
MINOR_MAX = 0xFFFFF


def encode_device(major: int, minor: int) -> int:
    """A device number as the kernel's new_encode_dev makes it; major < 2**12, minor < 2**20."""
    return minor & 0xFF | major << 8 | (minor & ~0xFF) << 12


def decode_device(device: int) -> tuple[int, int]:
    """(major, minor) of a number that `encode_device` made."""
    return device >> 8 & MAJOR_MAX, device & 0xFF | device >> 12 & 0xFFF00
