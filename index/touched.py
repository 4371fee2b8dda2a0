"""Which files lie in given chunks of an image's layers."""

from __future__ import annotations

import stat
from typing import TYPE_CHECKING

from index.tables import CHUNK_SIZE

if TYPE_CHECKING:
    from collections.abc import Collection

    from index.erofs.reader import Image


def files_in(
    tree: Image, places: Collection[tuple[int, int]]
) -> dict[tuple[int, int], list[bytes]]:
    """The paths of the files that have bytes in each of these (layer, chunk), in the order of their
    bytes. A file of several names goes by one. Takes some 10 us a file of the image.
    """
    wanted = frozenset(places)
    found: dict[tuple[int, int], list[tuple[int, bytes]]] = {place: [] for place in wanted}
    seen: set[int] = set()
    directories = [(tree.root, b"")]
    while directories:
        directory, path = directories.pop()
        for _, name, nid, _ in tree.readdir(directory):
            if name in (b".", b"..") or nid in seen:
                continue
            inode = tree.inode(nid)
            if stat.S_ISDIR(inode.mode):
                seen.add(nid)
                directories.append((nid, path + b"/" + name))
            elif stat.S_ISREG(inode.mode) and inode.size:
                seen.add(nid)
                for piece in tree.map(nid, 0, inode.size):
                    if not piece.device:
                        continue
                    first = piece.offset // CHUNK_SIZE
                    last = (piece.offset + piece.length - 1) // CHUNK_SIZE
                    for chunk in range(first, last + 1):
                        if (piece.device - 1, chunk) in wanted:
                            at = found[piece.device - 1, chunk]
                            at.append((piece.offset, path + b"/" + name))
    return {place: [path for _, path in sorted(held)] for place, held in found.items()}
