"""Write a merged tree as an EROFS image that has the metadata and points into the layers.

The order in an image: superblock and device table; data blocks (directories, long symlink
targets, embedded data); inodes; shared xattrs. Inodes of one directory are neighbours, and
directories come in the order of a walk, so that a listing with stat reads few pages and similar
records are close for compressors.
"""

from __future__ import annotations

import hashlib
import stat
import struct
from typing import TYPE_CHECKING

from index.erofs import chunks
from index.erofs.directory import Names
from index.erofs.layout import (
    BLOCK_BITS,
    BLOCK_SIZE,
    CHUNK_INDEX,
    DTYPES,
    FORMAT_CHUNKED,
    FORMAT_FLAT,
    FORMAT_INLINE,
    INODE,
    MAJOR_MAX,
    MINOR_MAX,
    NANOSECONDS,
    SLOT_SIZE,
    SYMLINK_MAX,
    WHOLE_FILE,
    WHOLE_FILE_CHUNKS,
    WHOLE_FILE_MAX,
    XATTR_BODY,
    XATTR_UNIT,
    align,
    encode_device,
)
from index.erofs.superblock import MAX_BLOCKS, MAX_DEVICES, Superblock, head_size
from index.erofs.xattrs import SharedXattrs
from index.errors import UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from index.tree import Node

_FILE_SIZE_MAX = (1 << 63) - 1
_TYPE_BITS = 0o170000
_DTYPE_DIRECTORY = DTYPES[stat.S_IFDIR]


def write(root: Node, devices: Sequence[int]) -> bytes:
    """The image of a tree over layers with these sizes of raw space, in bytes.

    The same tree gives the same bytes. Link counts are taken from the nodes. Raises
    UnsupportedError, with the path, for what EROFS cannot hold.
    """
    if len(devices) > MAX_DEVICES:
        raise UnsupportedError(f"{len(devices)} layers; an EROFS image can have {MAX_DEVICES}")
    for layer, size in enumerate(devices):
        if size > MAX_BLOCKS * BLOCK_SIZE:
            raise UnsupportedError(f"layer {layer} has {size} bytes; EROFS reaches 2 TiB of it")
    return _Writer(root, devices).write()


class _Directory:
    """A directory whose inode is written and whose entries are not."""

    __slots__ = ("inline_at", "name", "names", "nid", "node", "parent", "start")

    def __init__(self, node: Node, name: bytes, parent: _Directory | None) -> None:
        self.node = node
        self.name = name
        self.parent = parent
        self.names = Names(node.children)
        self.nid = 0
        self.start = 0  # of its whole blocks, in the data
        self.inline_at = -1  # of its tail, in the inodes; -1: there is none


class _Writer:
    def __init__(self, root: Node, devices: Sequence[int]) -> None:
        self._root = root
        self._devices = devices
        self._shared = SharedXattrs(_all_xattrs(root))
        self._inodes = bytearray()
        self._data = bytearray()
        self._data_block = head_size(len(devices)) // BLOCK_SIZE
        self._inode_count = 0
        self._linked: dict[Node, int] = {}  # inodes with several names, by identity
        self._at: tuple[_Directory | None, bytes] = (None, b"")  # for messages

    def write(self) -> bytes:
        try:
            root = self._place_tree()
        except UnsupportedError as error:
            raise UnsupportedError(f"{self._path()}: {error.message}") from error
        except struct.error as error:
            raise UnsupportedError(
                f"{self._path()}: mode, owner, time or link count is out of range"
            ) from error
        return self._image(root)

    def _path(self) -> str:
        directory, name = self._at
        parts = [name]
        while directory is not None:
            parts.append(directory.name)
            directory = directory.parent
        return b"/".join(reversed(parts)).decode("utf-8", "backslashreplace") or "/"

    def _place_tree(self) -> int:
        root = self._place_directory(self._root, b"", None)
        stack = [root]
        while stack:
            stack.extend(reversed(self._place_children(stack.pop())))
        return root.nid

    def _image(self, root: int) -> bytes:
        self._inodes += bytes(-len(self._inodes) % BLOCK_SIZE)
        shared = self._shared.area.ljust(align(len(self._shared.area), BLOCK_SIZE), b"\0")
        meta_block = self._next_data_block()
        xattr_block = meta_block + len(self._inodes) // BLOCK_SIZE
        blocks = xattr_block + len(shared) // BLOCK_SIZE
        if blocks > MAX_BLOCKS:
            raise UnsupportedError(f"the tree needs an image of {blocks} blocks")
        parts = (self._data, self._inodes, shared)
        # The UUID tells overlayfs one lower file system from another, so it names the content.
        hasher = hashlib.sha256(repr(tuple(self._devices)).encode())
        for part in parts:
            hasher.update(part)
        head = Superblock(
            root=root,
            inode_count=self._inode_count,
            blocks=blocks,
            meta_block=meta_block,
            xattr_block=xattr_block,
            device_blocks=tuple(align(size, BLOCK_SIZE) // BLOCK_SIZE for size in self._devices),
            uuid=hasher.digest()[:16],
        ).pack()
        return b"".join((head, *parts))

    def _next_data_block(self) -> int:
        return self._data_block + len(self._data) // BLOCK_SIZE

    def _place_children(self, directory: _Directory) -> list[_Directory]:
        """Write the inodes of a directory's children and its entries; return subdirectories."""
        parent = directory.parent or directory
        nids: list[int] = []
        dtypes: list[int] = []
        below: list[_Directory] = []
        children = directory.node.children
        names = directory.names
        for name in names.names:
            self._at = (directory, name)
            node = children.get(name)
            if node is None:
                dtype = _DTYPE_DIRECTORY
                nid = directory.nid if name == b"." else parent.nid
            elif (dtype := DTYPES.get(node.mode & _TYPE_BITS, 0)) == _DTYPE_DIRECTORY:
                child = self._place_directory(node, name, directory)
                below.append(child)
                nid = child.nid
            elif node.nlink == 1:
                nid = self._place(node)
            else:
                known = self._linked.get(node)
                nid = self._place(node) if known is None else known
                self._linked[node] = nid
            nids.append(nid)
            dtypes.append(dtype)
        packed = names.pack(nids, dtypes)
        if directory.inline_at >= 0:
            at = directory.inline_at
            self._inodes[at : at + names.tail] = packed[-names.tail :]
            packed = packed[: -names.tail]
        self._data[directory.start : directory.start + len(packed)] = packed
        directory.names = _NO_NAMES  # subdirectories keep this object alive for messages
        return below

    def _place(self, node: Node) -> int:
        """Write the inode of anything but a directory; return its number."""
        kind = node.mode & _TYPE_BITS
        if kind == stat.S_IFREG:
            if len(node.extents) == 1 and not node.xattrs and not node.embedded:
                extent = node.extents[0]
                if extent.file_offset == 0 and extent.length == node.size <= WHOLE_FILE_MAX:
                    return self._place_whole_file(node, extent.layer, extent.raw_offset)
            return self._place_file(node)
        if kind == stat.S_IFLNK:
            return self._place_symlink(node)
        if kind not in DTYPES:
            raise UnsupportedError(f"mode {node.mode:#o} has no file type")
        body = self._shared.body(node.xattrs)
        device = 0
        if kind in (stat.S_IFCHR, stat.S_IFBLK):
            major, minor = node.rdev
            if not (0 <= major <= MAJOR_MAX and 0 <= minor <= MINOR_MAX):
                raise UnsupportedError(f"device number {major}:{minor} is out of range")
            device = encode_device(major, minor)
        return self._append(_inode(node, FORMAT_FLAT, 0, device, body))

    def _append(self, inode: bytes) -> int:
        nid = len(self._inodes) // SLOT_SIZE
        self._inodes += inode
        self._inodes += bytes(-len(inode) % SLOT_SIZE)
        self._inode_count += 1
        return nid

    def _place_whole_file(self, node: Node, layer: int, raw_offset: int) -> int:
        self._check_extent(layer, raw_offset, node.size)
        seconds, nanoseconds = divmod(node.mtime_ns, NANOSECONDS)
        return self._append(
            WHOLE_FILE.pack(
                FORMAT_CHUNKED,
                0,
                node.mode,
                node.size,
                WHOLE_FILE_CHUNKS,
                node.uid,
                node.gid,
                seconds,
                nanoseconds,
                node.nlink,
                0,
                layer + 1,
                raw_offset >> BLOCK_BITS,
            )
        )

    def _place_file(self, node: Node) -> int:
        body = self._shared.body(node.xattrs)
        if not 0 <= node.size <= _FILE_SIZE_MAX:
            raise UnsupportedError(f"a size of {node.size} bytes is out of range")
        if node.size == 0:
            return self._append(_inode(node, FORMAT_FLAT, 0, 0, body))
        pieces = []
        for extent in node.extents:
            at_end = extent.file_offset + extent.length >= node.size
            length = extent.length if at_end else align(extent.length, BLOCK_SIZE)
            self._check_extent(extent.layer, extent.raw_offset, length)
            pieces.append(
                chunks.Piece(
                    extent.file_offset,
                    extent.length,
                    extent.layer + 1,
                    extent.raw_offset >> BLOCK_BITS,
                )
            )
        for offset, data in node.embedded:
            pieces.append(chunks.Piece(offset, len(data), 0, self._next_data_block()))
            self._data += data.ljust(align(len(data), BLOCK_SIZE), b"\0")
        chunk_format, indices = chunks.encode(node.size, pieces)
        inode = _inode(node, FORMAT_CHUNKED, node.size, chunk_format, body)
        return self._append(inode.ljust(align(len(inode), CHUNK_INDEX.size), b"\0") + indices)

    def _check_extent(self, layer: int, raw_offset: int, length: int) -> None:
        if raw_offset % BLOCK_SIZE:
            raise UnsupportedError(f"data at {raw_offset} of layer {layer} is not on a block")
        if not (
            0 <= layer < len(self._devices)
            and 0 <= raw_offset <= self._devices[layer] - length
            and length > 0
        ):
            raise UnsupportedError(f"{length} bytes at {raw_offset} are outside of layer {layer}")

    def _place_symlink(self, node: Node) -> int:
        target = node.target
        if not 0 < len(target) <= SYMLINK_MAX or b"\0" in target:
            raise UnsupportedError(
                f"a symlink's target of {len(target)} bytes; it must have 1 to {SYMLINK_MAX} "
                "without NUL"
            )
        body = self._shared.body(node.xattrs)
        whole = INODE.size + len(body) + len(target)
        if whole > BLOCK_SIZE:
            start = self._next_data_block()
            self._data += target.ljust(align(len(target), BLOCK_SIZE), b"\0")
            return self._append(_inode(node, FORMAT_FLAT, len(target), start, body))
        # Kernels before 6.13 refuse a target that does not share a block with its inode's start.
        if len(self._inodes) % BLOCK_SIZE + whole > BLOCK_SIZE:
            self._inodes += bytes(-len(self._inodes) % BLOCK_SIZE)
        return self._append(_inode(node, FORMAT_INLINE, len(target), 0, body) + target)

    def _place_directory(self, node: Node, name: bytes, parent: _Directory | None) -> _Directory:
        """Write a directory's inode and make room for its entries.

        The last block goes inline if the padding that this may take is no more than what a block
        of its own would leave empty.
        """
        directory = _Directory(node, name, parent)
        names = directory.names
        body = self._shared.body(node.xattrs)
        directory.start = len(self._data)
        start_block = self._next_data_block()
        tail_at = (len(self._inodes) + INODE.size + len(body)) % BLOCK_SIZE
        padding = 0
        if tail_at + names.tail > BLOCK_SIZE:
            padding = align(BLOCK_SIZE - tail_at, SLOT_SIZE)
            tail_at = (tail_at + padding) % BLOCK_SIZE
        if tail_at + names.tail > BLOCK_SIZE or padding > BLOCK_SIZE - names.tail:
            self._data += bytes(align(names.size, BLOCK_SIZE))
            inode = _inode(node, FORMAT_FLAT, names.size, start_block, body)
        else:
            self._inodes += bytes(padding)
            self._data += bytes(names.size - names.tail)
            directory.inline_at = len(self._inodes) + INODE.size + len(body)
            inode = _inode(node, FORMAT_INLINE, names.size, start_block, body) + bytes(names.tail)
        directory.nid = self._append(inode)
        return directory


_NO_NAMES = Names(())


def _inode(node: Node, form: int, size: int, union: int, body: bytes) -> bytes:
    """An inode and its xattr body; `union` is the field whose meaning depends on the type."""
    seconds, nanoseconds = divmod(node.mtime_ns, NANOSECONDS)
    return (
        INODE.pack(
            form,
            (len(body) - XATTR_BODY.size) // XATTR_UNIT + 1 if body else 0,
            node.mode,
            size,
            union,
            node.uid,
            node.gid,
            seconds,
            nanoseconds,
            node.nlink,
        )
        + body
    )


def _all_xattrs(root: Node) -> Iterator[dict[bytes, bytes]]:
    """The xattrs of every inode that has some, each inode once, in no particular order."""
    linked: set[Node] = set()
    stack = [root]
    while stack:
        node = stack.pop()
        if node.xattrs and node not in linked:
            if node.nlink > 1:
                linked.add(node)
            yield node.xattrs
        stack.extend(node.children.values())
