"""What each layer of an image adds to the ones below it, as overlayfs has it in a directory.

A stack of these trees shows what the merger makes of the layers. They are made from what the
merged tree was before a layer and is after it, so nothing of the rules by which tars are applied
(order of whiteouts, symbolic links on the way) is left to whoever stacks them.

Source for overlayfs: Linux, Documentation/filesystems/overlayfs.rst, "whiteouts and opaque
directories".

What overlayfs cannot show: a name for an inode of a lower layer becomes a file of its own, with
the same data; and a character device 0:0 that an image brings hides its name.
"""

from __future__ import annotations

import stat
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from index.merge import Merger
from index.tree import Node

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from index.entry import Entry

OPAQUE = b"trusted.overlay.opaque"
"""The extended attribute that overlayfs reads where root has mounted it."""

USER_OPAQUE = b"user.overlay.opaque"
"""The one that it reads where it is mounted in a user namespace (`userxattr`, Linux 5.11)."""


def layer_trees(layers: Iterable[Iterable[Entry]], opaque: bytes = OPAQUE) -> Iterator[Node]:
    """The tree of each layer, given the entries of all of them, the lowest first.

    `opaque` is the extended attribute that marks opaque directories.

    A directory is in a layer's tree if the layer changed it or anything below it; it has the
    metadata that it has in the merged tree at that moment, and so has the root, always. Extents
    refer to the layers by number, lower ones too. Raises TarError or UnsupportedError as Merger.
    """
    merger = Merger()
    known = {merger.root: _Directory({}, {}, ())}
    for number, entries in enumerate(layers):
        merger.apply(number, entries)
        yield _Difference(merger.root, known, opaque).tree()


@dataclass(frozen=True, slots=True)
class _Directory:
    """What the merged tree had in a directory before a layer was applied."""

    children: dict[bytes, Node]
    subdirectories: dict[bytes, Node]
    metadata: tuple[object, ...]

    @classmethod
    def of(cls, node: Node) -> _Directory:
        children = node.children
        below = {name: child for name, child in children.items() if child.is_dir}
        return cls(children.copy(), below, _metadata(node))


_NEW = _Directory({}, {}, ())


class _Difference:
    """From the merged tree, and what is known of its directories, to a layer's tree.

    `known` is brought up to date. A node of the merged tree never moves and, unless it is a
    directory, never changes.
    """

    def __init__(self, root: Node, known: dict[Node, _Directory], opaque: bytes) -> None:
        self._root = root
        self._opaque = {opaque: b"y"}
        self._known = known
        self._made: dict[Node, Node] = {}  # of the layer's tree, by that of the merged tree

    def tree(self) -> Node:
        # No recursion: images may nest deeper than Python does.
        directories = [self._root]
        changed: set[Node] = set()
        for node in directories:
            was = self._known.get(node)
            if was is None or was.children != node.children or was.metadata != _metadata(node):
                changed.add(node)
                directories.extend(child for child in node.children.values() if child.is_dir)
            else:
                directories.extend(was.subdirectories.values())
        for node in reversed(directories):
            was = self._known.get(node, _NEW)
            children = self._children(node, was, every=node in changed)
            if children or node in changed or node is self._root:
                self._make_directory(node, was, children)
        self._known.update((node, _Directory.of(node)) for node in changed)
        return self._made[self._root]

    def _children(self, node: Node, was: _Directory, *, every: bool) -> dict[bytes, Node]:
        """What the layer has in a directory, but for whiteouts; those below are made already."""
        children: dict[bytes, Node] = {}
        for name, child in (node.children if every else was.subdirectories).items():
            old = was.children.get(name)
            if child.is_dir:
                made = self._made.get(child)
                if made is None:
                    continue
                if old is not None and old.is_dir and old is not child:
                    made.xattrs = made.xattrs | self._opaque
                children[name] = made
            elif child is not old:
                children[name] = self._file(child)
        return children

    def _file(self, node: Node) -> Node:
        made = self._made.get(node)
        if made is None:
            made = self._made[node] = replace(node, nlink=0)
        made.nlink += 1
        return made

    def _make_directory(self, node: Node, was: _Directory, children: dict[bytes, Node]) -> None:
        made = self._made[node] = replace(node, children=children)
        made.nlink = 2 + sum(child.is_dir for child in children.values())
        gone = was.children.keys() - node.children.keys()
        stays = any(old is node.children.get(name) for name, old in was.children.items())
        if gone and not stays and node is not self._root:  # whose mark overlayfs does not heed
            made.xattrs = node.xattrs | self._opaque
        else:
            children.update((name, Node(stat.S_IFCHR)) for name in gone)


def _metadata(node: Node) -> tuple[object, ...]:
    return node.mode, node.uid, node.gid, node.mtime_ns, node.xattrs
