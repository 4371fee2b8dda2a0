"""Layers merged in memory, in the form in which trees on disk are compared."""

from __future__ import annotations

import hashlib
import os
import stat
from collections import defaultdict
from typing import TYPE_CHECKING

from index.merge import Merger
from index.tar import TarScanner
from index.tree import Node, walk
from tests.support.tars import tar
from tests.support.trees import Item

if TYPE_CHECKING:
    from collections.abc import Sequence

    from index.entry import Entry
    from tests.support.tars import Member


def scan(archive: bytes, piece: int = 1 << 20) -> list[Entry]:
    """All entries of an archive, fed in pieces of `piece` bytes."""
    scanner = TarScanner()
    entries = []
    for start in range(0, len(archive), piece):
        entries += scanner.feed(archive[start : start + piece])
    scanner.finish()
    return entries


def merge(layers: Sequence[bytes]) -> Node:
    merger = Merger()
    for number, layer in enumerate(layers):
        merger.apply(number, scan(layer))
    return merger.finish()


def apply(*layers: Sequence[Member]) -> dict[bytes, Node]:
    """Merge layers of these members; returns every path of the tree with its node."""
    return dict(walk(merge([tar(*members) for members in layers])))


def content(node: Node, layers: Sequence[bytes]) -> bytes:
    """A regular file's bytes, put together from the layers. Checks the alignment of its data."""
    data = bytearray(node.size)
    covered = 0
    pieces = [
        (e.file_offset, layers[e.layer][e.raw_offset : e.raw_offset + e.length])
        for e in node.extents
    ]
    assert all(e.raw_offset % 512 == 0 for e in node.extents)
    for offset, piece in sorted([*pieces, *node.embedded]):
        assert offset % 512 == 0
        assert offset >= covered, "data overlaps"
        covered = offset + len(piece)
        assert covered <= node.size
        assert len(piece) % 512 == 0 or covered == node.size
        data[offset:covered] = piece
    return bytes(data)


def items(root: Node, layers: Sequence[bytes]) -> dict[bytes, Item]:
    """What an unpack of `layers` must look like, if `root` is right."""
    nodes = {b"" if path == b"/" else path: node for path, node in walk(root)}
    names: dict[Node, list[bytes]] = defaultdict(list)
    for path, node in nodes.items():
        names[node].append(path)
    return {path: _item(node, tuple(sorted(names[node])), layers) for path, node in nodes.items()}


def _item(node: Node, names: tuple[bytes, ...], layers: Sequence[bytes]) -> Item:
    is_regular = stat.S_ISREG(node.mode)
    is_device = stat.S_ISCHR(node.mode) or stat.S_ISBLK(node.mode)
    return Item(
        mode=node.mode,
        uid=node.uid,
        gid=node.gid,
        size=None if node.is_dir else node.size,
        mtime_ns=node.mtime_ns,
        nlink=None if node.is_dir else node.nlink,
        rdev=os.makedev(*node.rdev) if is_device else None,
        target=node.target if stat.S_ISLNK(node.mode) else None,
        xattrs=tuple(sorted(node.xattrs.items())),
        content=hashlib.sha256(content(node, layers)).hexdigest() if is_regular else None,
        names=names,
    )
