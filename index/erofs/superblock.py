"""The head of an image: EROFS superblock and device table."""

from __future__ import annotations

import functools
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

from index.erofs.layout import BLOCK_BITS, BLOCK_SIZE, align
from index.errors import FormatError

if TYPE_CHECKING:
    from index.erofs.reader import Buffer

OFFSET = 1024
"""Where the superblock starts; the bytes before it are left to boot loaders, and zero here."""

# Superblock, 128 bytes
#
#   offset size field
#   0      4    magic
#   4      4    CRC-32C of the superblock's block, taken with zeros here
#   8      4    compatible features
#   12     1    log2 of the block size
#   13     1    extension slots, 0
#   14     2    nid of the root directory
#   16     8    number of inodes
#   24     12   base time of compact inodes, 0
#   36     4    blocks of the image
#   40     4    first block of the inodes
#   44     4    first block of the shared xattrs
#   48     16   UUID
#   64     16   volume name, empty
#   80     4    incompatible features
#   84     2    compression algorithms, 0
#   86     2    extra devices
#   88     2    offset of the device table in slots of 128 bytes
#   90     38   directory block size (0: one block), long xattr prefixes, packed inode,
#               reserved; all 0
_SUPERBLOCK = struct.Struct("<IIIBxHQ12xIII16s16xI2xHH38x")
_CRC_OFFSET = OFFSET + 4

_MAGIC = 0xE0F5E1E2
_COMPATIBLE = 0x1 | 0x2
"""There is a checksum; inodes hold mtime."""
_INCOMPATIBLE = 0x4 | 0x8
"""There are chunk-based files; there is a device table."""

# Device slot, 128 bytes
#
#   offset size field
#   0      64   tag; here "layer-" and the layer's number
#   64     4    blocks
#   68     60   start in a unified address space (0: not in one), high bits, reserved; all 0
_DEVICE = struct.Struct("<64sI60x")
_DEVICE_TABLE = OFFSET + _SUPERBLOCK.size

MAX_DEVICES = 0xFFFF
MAX_BLOCKS = 0xFFFF_FFFF
"""Blocks that an image or a device can have: one less than 32 bits count, which mean a hole."""


def head_size(devices: int) -> int:
    """Bytes of superblock and device table with all that is before them; whole blocks."""
    return align(_DEVICE_TABLE + devices * _DEVICE.size, BLOCK_SIZE)


@dataclass(frozen=True, slots=True)
class Superblock:
    """What is different between one image and another. Sizes and addresses are in blocks."""

    root: int
    inode_count: int
    blocks: int
    meta_block: int
    xattr_block: int
    device_blocks: tuple[int, ...]
    uuid: bytes = bytes(16)

    def pack(self) -> bytes:
        """The image's head, `head_size(len(device_blocks))` bytes."""
        head = bytearray(head_size(len(self.device_blocks)))
        _SUPERBLOCK.pack_into(
            head,
            OFFSET,
            _MAGIC,
            0,
            _COMPATIBLE,
            BLOCK_BITS,
            self.root,
            self.inode_count,
            self.blocks,
            self.meta_block,
            self.xattr_block,
            self.uuid,
            _INCOMPATIBLE,
            len(self.device_blocks),
            _DEVICE_TABLE // _DEVICE.size,
        )
        for layer, blocks in enumerate(self.device_blocks):
            _DEVICE.pack_into(
                head, _DEVICE_TABLE + layer * _DEVICE.size, b"layer-%d" % layer, blocks
            )
        checksum = _crc32c(bytes(head[OFFSET : OFFSET + BLOCK_SIZE]))
        head[_CRC_OFFSET : _CRC_OFFSET + 4] = checksum.to_bytes(4, "little")
        return bytes(head)

    @classmethod
    def parse(cls, image: Buffer) -> Superblock:
        """Read an image's head.

        Raises FormatError for everything that `pack` does not write: an image by other tools,
        unknown features, a wrong checksum, reserved fields that are not zero, or a size that is
        not the image's.
        """
        if len(image) < head_size(0):
            raise FormatError(f"an EROFS image of {len(image)} bytes has no superblock")
        (
            magic,
            _,
            compatible,
            block_bits,
            root,
            inode_count,
            blocks,
            meta_block,
            xattr_block,
            uuid,
            incompatible,
            devices,
            device_table,
        ) = _SUPERBLOCK.unpack_from(image, OFFSET)
        if magic != _MAGIC:
            raise FormatError("not an EROFS image")
        if (compatible, incompatible, block_bits) != (_COMPATIBLE, _INCOMPATIBLE, BLOCK_BITS):
            raise FormatError(
                f"an EROFS image with features {compatible:#x} and {incompatible:#x} and blocks "
                f"of 2**{block_bits} bytes was not written by FirstByte"
            )
        size = head_size(devices)
        if blocks * BLOCK_SIZE != len(image) or size > len(image):
            raise FormatError(
                f"an EROFS image of {blocks} blocks and {devices} devices has {len(image)} bytes"
            )
        if device_table * _DEVICE.size != _DEVICE_TABLE:
            raise FormatError(f"EROFS device table in slot {device_table}")
        for name, block in (("inodes", meta_block), ("shared xattrs", xattr_block)):
            if not size <= block * BLOCK_SIZE <= len(image):
                raise FormatError(f"EROFS {name} at block {block} of {blocks}")
        parsed = cls(
            root=root,
            inode_count=inode_count,
            blocks=blocks,
            meta_block=meta_block,
            xattr_block=xattr_block,
            device_blocks=tuple(
                _DEVICE.unpack_from(image, _DEVICE_TABLE + layer * _DEVICE.size)[1]
                for layer in range(devices)
            ),
            uuid=uuid,
        )
        if parsed.pack() != bytes(image[:size]):
            raise FormatError("EROFS superblock or device table is damaged")
        return parsed


@functools.cache
def _crc_table() -> tuple[int, ...]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return tuple(table)


def _crc32c(data: bytes) -> int:
    """CRC-32C (Castagnoli) as EROFS takes it: all ones to begin with, not inverted at the end."""
    table = _crc_table()
    crc = 0xFFFF_FFFF
    for byte in data:
        crc = crc >> 8 ^ table[(crc ^ byte) & 0xFF]
    return crc
