"""Path lookup in an image's tree, as the kernel would do it in a root of its own."""

from __future__ import annotations

import stat
from typing import TYPE_CHECKING

from index.errors import FormatError

if TYPE_CHECKING:
    from index.erofs.reader import Image

MAX_SYMLINKS = 40  # of one lookup: MAXSYMLINKS of the kernel


def resolve(tree: Image, path: bytes) -> int | None:
    """The inode that `path` names, the last component not followed; None if there is none.

    Relative paths count from the root, and `..` of the root is the root. Raises FormatError when
    symlinks lead in circles.
    """
    trail = [tree.root]
    parts = _split(path)
    symlinks = 0
    while parts:
        part = parts.pop()
        if part == b"..":
            if len(trail) > 1:
                trail.pop()
            continue
        if not stat.S_ISDIR(tree.inode(trail[-1]).mode):
            return None
        nid = tree.lookup(trail[-1], part)
        if nid is None:
            return None
        if parts and stat.S_ISLNK(tree.inode(nid).mode):
            symlinks += 1
            if symlinks > MAX_SYMLINKS:
                raise FormatError(f"{path!r} goes through more than {MAX_SYMLINKS} symlinks")
            target = tree.readlink(nid)
            if target.startswith(b"/"):
                del trail[1:]
            parts += _split(target)
            continue
        trail.append(nid)
    return trail[-1]


def _split(path: bytes) -> list[bytes]:
    """The components, the first one last."""
    return [part for part in reversed(path.split(b"/")) if part not in (b"", b".")]
