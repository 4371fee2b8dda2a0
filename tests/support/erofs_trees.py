"""Trees to make EROFS images of, and what a reader of such an image must find."""

from __future__ import annotations

import random
import stat
from typing import TYPE_CHECKING

from hypothesis import strategies as st

from index.tree import Extent, Node

if TYPE_CHECKING:
    from collections.abc import Sequence

    from index.erofs.reader import Image

LAYERS = tuple(
    random.Random(number).randbytes(size) for number, size in enumerate((40960, 0, 9000))
)
"""Raw space of the layers that the trees of `trees()` refer to. One is empty, one not in blocks."""

DEVICES = tuple(map(len, LAYERS))

_DTYPES = {0o10: 1, 0o4: 2, 0o2: 3, 0o6: 4, 0o1: 5, 0o14: 6, 0o12: 7}


def directory(
    children: dict[bytes, Node] | None = None, mode: int = 0o755, **fields: object
) -> Node:
    """A directory with the right link count."""
    node = Node(stat.S_IFDIR | mode, children=children or {}, **fields)  # type: ignore[arg-type]
    node.nlink = 2 + sum(child.is_dir for child in node.children.values())
    return node


def symlink(target: bytes, **fields: object) -> Node:
    return Node(stat.S_IFLNK | 0o777, size=len(target), target=target, **fields)  # type: ignore[arg-type]


def regular(size: int = 0, *extents: Extent, **fields: object) -> Node:
    return Node(stat.S_IFREG | 0o644, size=size, extents=extents, **fields)  # type: ignore[arg-type]


def content(node: Node, layers: Sequence[bytes]) -> bytes:
    """A regular file's bytes."""
    data = bytearray(node.size)
    for extent in node.extents:
        end = extent.raw_offset + extent.length
        data[extent.file_offset : extent.file_offset + extent.length] = layers[extent.layer][
            extent.raw_offset : end
        ]
    for offset, piece in node.embedded:
        data[offset : offset + len(piece)] = piece
    return bytes(data)


def read(image: Image, layers: Sequence[bytes], nid: int, offset: int, length: int) -> bytes:
    """A range of a regular file by the pieces that the image gives, which must leave no gap."""
    found = bytearray()
    for piece in image.map(nid, offset, length):
        assert piece.file_offset == offset + len(found)
        assert piece.length > 0
        if piece.device is None:
            found += bytes(piece.length)
        else:
            source = layers[piece.device - 1] if piece.device else image.buffer
            data = bytes(source[piece.offset : piece.offset + piece.length])
            assert len(data) == piece.length
            found += data
    return bytes(found)


def assert_holds(image: Image, root: Node, layers: Sequence[bytes]) -> None:
    """The image is of this tree, as far as its reader can tell."""
    nids = {root: image.root}
    stack = [(root, image.root)]
    while stack:
        node, nid = stack.pop()
        assert nids.setdefault(node, nid) == nid
        inode = image.inode(nid)
        assert (inode.nid, inode.mode, inode.uid, inode.gid) == (nid, node.mode, node.uid, node.gid)
        assert (inode.mtime_ns, inode.nlink, inode.rdev) == (node.mtime_ns, node.nlink, node.rdev)
        assert image.xattrs(nid) == node.xattrs
        assert image.has_xattrs(nid) == bool(node.xattrs)
        if node.is_dir:
            listing = list(image.readdir(nid))
            assert [name for _, name, _, _ in listing] == sorted(node.children)
            for _, name, child_nid, dtype in listing:
                child = node.children[name]
                assert dtype == _DTYPES[child.mode >> 12]
                assert image.lookup(nid, name) == child_nid
                stack.append((child, child_nid))
        else:
            assert inode.size == node.size
            if stat.S_ISLNK(node.mode):
                assert image.readlink(nid) == node.target
            elif stat.S_ISREG(node.mode):
                assert read(image, layers, nid, 0, node.size + 1) == content(node, layers)
    assert image.inode_count == len(nids)


_LEGAL = bytes.maketrans(b"/\0", b"_0")


def _legal(name: bytes) -> bytes:
    name = name.translate(_LEGAL)
    return {b".": b"dot", b"..": b"dots"}.get(name, name)


names = st.one_of(
    st.binary(min_size=1, max_size=12),
    st.binary(min_size=1, max_size=255),
    st.text("ab.-", min_size=1, max_size=3).map(str.encode),
).map(_legal)

xattr_names = st.builds(
    bytes.__add__,
    st.sampled_from([b"user.", b"trusted.", b"security."]),
    st.binary(min_size=1, max_size=20).map(_legal),
) | st.sampled_from([b"system.posix_acl_access", b"system.posix_acl_default"])

xattr_sets = st.dictionaries(
    xattr_names, st.binary(max_size=40) | st.sampled_from([b"y", b"common" * 20]), max_size=4
)


@st.composite
def files(draw: st.DrawFn) -> Node:
    """A regular file: empty, whole, a hole, or pieces of layers and of its own between holes."""
    extents, embedded, position = [], [], 0
    kinds = draw(st.lists(st.sampled_from(["hole", "layer 0", "layer 2", "own"]), max_size=5))
    for kind in kinds:
        blocks = draw(st.integers(1, 6))
        length = blocks * 512
        if kind == "own":
            embedded.append((position, bytes([draw(st.integers(0, 255))]) * length))
        elif kind != "hole":
            layer = int(kind[-1])
            start = draw(st.integers(0, DEVICES[layer] // 512 - blocks)) * 512
            extents.append(Extent(position, layer, start, length))
        position += length
    # A file may end inside its last block, and so may its last extent or piece with it.
    size = position and position - draw(st.integers(0, 511))
    if extents and extents[-1].file_offset + extents[-1].length == position:
        last = extents.pop()
        length = size - last.file_offset
        extents.append(Extent(last.file_offset, last.layer, last.raw_offset, length))
    elif embedded and embedded[-1][0] + len(embedded[-1][1]) == position:
        offset, data = embedded.pop()
        embedded.append((offset, data[: size - offset]))
    return Node(stat.S_IFREG, size=size, extents=tuple(extents), embedded=tuple(embedded))


def _link(target: bytes) -> Node:
    return Node(stat.S_IFLNK, size=len(target), target=target)


def _device(kind: int, major: int, minor: int) -> Node:
    return Node(kind, rdev=(major, minor))


nodes = st.one_of(
    files(),
    st.builds(lambda: Node(stat.S_IFDIR, nlink=2)),
    st.binary(min_size=1, max_size=600).map(lambda t: _link(t.replace(b"\0", b"0"))),
    st.builds(
        _device,
        st.sampled_from([stat.S_IFCHR, stat.S_IFBLK]),
        st.integers(0, 0xFFF),
        st.integers(0, 0xFFFFF),
    ),
    st.sampled_from([stat.S_IFIFO, stat.S_IFSOCK]).map(Node),
)


@st.composite
def trees(draw: st.DrawFn) -> Node:
    """Any tree over LAYERS: every type of inode, hard links, and all values fields can have."""
    root = Node(stat.S_IFDIR, nlink=2)
    made = [root]
    directories = [root]
    for _ in range(draw(st.integers(0, 12))):
        parent = draw(st.sampled_from(directories))
        name = draw(names)
        if name in parent.children:
            continue
        links = [node for node in made if not node.is_dir]
        if links and draw(st.integers(0, 4)) == 0:
            node = draw(st.sampled_from(links))
            node.nlink += 1
        else:
            node = draw(nodes)
            made.append(node)
        parent.children[name] = node
        if node.is_dir:
            directories.append(node)
            parent.nlink += 1
    ids = st.integers(0, 2**32 - 2)  # the kernel takes the last for no owner at all
    for node in made:
        node.mode |= draw(st.integers(0, 0o7777))
        node.uid, node.gid = draw(ids), draw(ids)
        node.mtime_ns = draw(st.integers(-(2**62), 2**63))
        node.xattrs = draw(xattr_sets)
    return root
