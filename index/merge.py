"""The merger: layers are applied in order to one tree, as an unpack into one directory would.

The rules are those of the OCI image specification ("Image Layer Filesystem Changeset", Applying
Changesets) and, where that is silent, of `umoci unpack`, which is the reference of the tests:

- A whiteout hides only what lower layers gave, wherever it stands in its layer.
- A directory over a directory replaces the metadata; everything else replaces what was there.
- Parents are resolved inside the image, however their names or symbolic links look; the last
  component of a name is never followed.
- A hard link gives an inode another name, and its own metadata is ignored.
- Adding and removing names leaves a directory's mtime alone; directories that no layer describes
  are 0755, of root, from 1970.

Extended attributes are kept byte for byte where Linux lets them be and EROFS can store them:
`user.` (regular files and directories only), `trusted.`, `security.` and POSIX ACLs (not on
symbolic links; default ones on directories only). Others are dropped. `trusted.overlay.*` is
dropped as well: it is overlayfs's own state, and an image that brought its own could redirect or
hide files of the mount above it. Overlayfs shows no such attribute to a container either.
"""

from __future__ import annotations

import stat
from typing import TYPE_CHECKING

from index.entry import Entry, EntryType
from index.errors import TarError, UnsupportedError
from index.header import BLOCK
from index.names import check_component, components, quoted
from index.tree import Extent, Node

if TYPE_CHECKING:
    from collections.abc import Iterable

MAX_NODES = 1 << 23
"""Inodes made in one image, those replaced later included: a bomb of headers must not fill memory.
Guessed; the largest images known have about a million files."""

MAX_INLINE = 256 << 20
"""Bytes of extended attributes and embedded data in one image, those replaced later included: all
of it has to be in memory and in the file index. Guessed."""

_MAX_SYMLINKS = 255  # in one path; the limit of the libraries that container runtimes use
_MAX_TARGET = 4095  # bytes of a symbolic link: Linux's PATH_MAX without the NUL
_MAX_XATTR_NAME = 255  # Linux's XATTR_NAME_MAX
_MAX_XATTR_VALUE = 0xFFFF  # EROFS has 16 bits for it; Linux takes one byte more
_MAX_MAJOR, _MAX_MINOR = 0xFFF, 0xFFFFF  # Linux's dev_t

_WHITEOUT = b".wh."
_OPAQUE = b".wh..wh..opq"
_AUFS = b".wh..wh."  # aufs's own files

_DIRECTORY_MODE = stat.S_IFDIR | 0o755
_FORMATS = {
    EntryType.REGULAR: stat.S_IFREG,
    EntryType.DIRECTORY: stat.S_IFDIR,
    EntryType.SYMLINK: stat.S_IFLNK,
    EntryType.CHARACTER: stat.S_IFCHR,
    EntryType.BLOCK: stat.S_IFBLK,
    EntryType.FIFO: stat.S_IFIFO,
}
_ACL_ACCESS = b"system.posix_acl_access"
_ACL_DEFAULT = b"system.posix_acl_default"


class Merger:
    """Builds `root` from the entries of each layer, the lowest first.

    Every problem is a TarError that names layer and entry (UnsupportedError where the input is
    fine but too much). The tree is not usable after one.
    """

    def __init__(self) -> None:
        self.root = Node(_DIRECTORY_MODE)
        self._layer = -1
        self._nodes = 1
        self._inline = 0
        # Names that this layer has written or put something below, by directory; the names on the
        # way to each of them are in it too.
        self._touched: dict[Node, set[bytes]] = {}
        # Directories under which nothing is left of lower layers, so that no sequence of entries
        # makes us look twice.
        self._own: set[Node] = set()
        # The parent of the entry before: archives list directory after directory. Nothing but the
        # removal of a name can make it wrong.
        self._last_parts: list[bytes] | None = None
        self._last_path: list[tuple[bytes, Node | None]] = []

    def begin_layer(self, layer: int) -> None:
        """Start with a layer's entries; layers come in ascending order."""
        if layer <= self._layer:
            raise ValueError(f"layer {layer} after layer {self._layer}")
        self._layer = layer
        self._touched = {}
        self._own = set()

    def apply(self, layer: int, entries: Iterable[Entry]) -> None:
        """Apply the next entries of a layer. The layer begins with the first call if need be."""
        if layer != self._layer:
            self.begin_layer(layer)
        for entry in entries:
            try:
                self._apply(entry)
            except (TarError, UnsupportedError) as error:
                where = f"layer {layer}, tar member {quoted(entry.name)}"
                raise type(error)(f"{where}: {error.message}", hint=error.hint) from None

    def finish(self) -> Node:
        """Count links: of directories 2 and their subdirectories, of others their names."""
        self.root.nlink = 2
        directories = [self.root]
        for directory in directories:
            for child in directory.children.values():
                child.nlink = 2 if child.is_dir else 0
                if child.is_dir:
                    directories.append(child)
        for directory in directories:
            for child in directory.children.values():
                if child.is_dir:
                    directory.nlink += 1
                else:
                    child.nlink += 1
        return self.root

    def _apply(self, entry: Entry) -> None:
        if entry.xattrs or entry.embedded:
            self._inline += sum(map(len, entry.xattrs.values()))
            self._inline += sum(len(data) for _, data in entry.embedded)
            if self._inline > MAX_INLINE:
                raise UnsupportedError(
                    f"the image has more than {MAX_INLINE} bytes of extended attributes "
                    "and of sparse data that do not start on a block"
                )
        parts = components(entry.name)
        if not parts:
            if entry.type is not EntryType.DIRECTORY:
                raise TarError(f"the root of an image cannot be a {entry.type.value}")
            _describe(self.root, entry)
            return
        name = parts.pop()
        if name.startswith(_WHITEOUT):
            self._last_parts = None
            self._white_out(self._resolve(parts), name)
            return
        check_component(name)
        if parts != self._last_parts:
            self._last_path = self._resolve(parts)
            self._make_parents(self._last_path)
            self._last_parts = parts
        path = self._last_path
        parent = (path[-1][1] if path else None) or self.root
        old = parent.children.get(name)
        if entry.type is EntryType.DIRECTORY and old is not None and old.is_dir:
            _describe(old, entry)
        else:
            # What was there goes first, so a link to it or to something below it fails.
            if old is not None:
                self._last_parts = None
                del parent.children[name]
            if entry.type is EntryType.HARDLINK:
                node = self._link_target(entry.linkname)
            else:
                node = self._make(entry)
            parent.children[name] = node
        self._touch(path, name)

    # A resolved path: the names from the root on, free of symbolic links, each with its node, or
    # None where nothing of that name is there.

    def _resolve(self, parts: list[bytes]) -> list[tuple[bytes, Node | None]]:
        """Follow every component inside the root, as Go's securejoin and fs.RootPath do."""
        path: list[tuple[bytes, Node | None]] = []
        followed = 0
        todo = parts[::-1]
        while todo:
            name = todo.pop()
            if name == b"..":
                if path:
                    path.pop()
                continue
            parent = path[-1][1] if path else self.root
            child = parent.children.get(name) if parent is not None else None
            if child is None or not stat.S_ISLNK(child.mode):
                path.append((name, child))
                continue
            followed += 1
            if followed > _MAX_SYMLINKS:
                raise TarError(f"more than {_MAX_SYMLINKS} symbolic links on the way to its parent")
            if child.target.startswith(b"/"):
                path.clear()
            todo.extend(p for p in reversed(child.target.split(b"/")) if p not in (b"", b"."))
        return path

    def _make_parents(self, path: list[tuple[bytes, Node | None]]) -> None:
        """Make the directories that are missing on the way to the end of `path`."""
        parent = self.root
        for depth, (name, node) in enumerate(path):
            if node is None:
                check_component(name)
                node = self._new_node(_DIRECTORY_MODE)
                self._own.add(node)
                parent.children[name] = node
                path[depth] = name, node
            elif not node.is_dir:
                taken = b"/".join(name for name, _ in path[: depth + 1])
                raise TarError(f"its parent {quoted(taken)} is not a directory")
            parent = node

    def _new_node(self, mode: int) -> Node:
        self._nodes += 1
        if self._nodes > MAX_NODES:
            raise UnsupportedError(f"the image has more than {MAX_NODES} files")
        return Node(mode)

    def _make(self, entry: Entry) -> Node:
        node = self._new_node(_FORMATS[entry.type])
        _describe(node, entry)
        if entry.type is EntryType.REGULAR:
            node.size = entry.size
            node.extents = _extents(entry, self._layer)
            node.embedded = _whole_blocks(entry)
        elif entry.type is EntryType.DIRECTORY:
            self._own.add(node)
        elif entry.type is EntryType.SYMLINK:
            if not 0 < len(entry.linkname) <= _MAX_TARGET or b"\0" in entry.linkname:
                raise TarError(f"{quoted(entry.linkname)} cannot be a symbolic link's target")
            node.target = entry.linkname
            node.size = len(node.target)
        elif entry.type is not EntryType.FIFO:
            node.rdev = entry.major, entry.minor
            if not (0 <= entry.major <= _MAX_MAJOR and 0 <= entry.minor <= _MAX_MINOR):
                raise TarError(f"its device number {entry.major}:{entry.minor} is out of range")
        return node

    def _link_target(self, linkname: bytes) -> Node:
        parts = components(linkname)
        path = self._resolve(parts[:-1])
        parent = path[-1][1] if path else self.root
        target = parent.children.get(parts[-1]) if parent and parts else self.root
        if target is None or parent is None:
            raise TarError(f"the target {quoted(linkname)} of this hard link does not exist")
        if target.is_dir:
            raise TarError(f"the target {quoted(linkname)} of this hard link is a directory")
        return target

    def _touch(self, path: list[tuple[bytes, Node | None]], name: bytes) -> None:
        for depth in range(len(path), -1, -1):
            parent = path[depth - 1][1] if depth else self.root
            assert parent is not None
            touched = self._touched.setdefault(parent, set())
            if name in touched:
                break
            touched.add(name)
            if depth:
                name = path[depth - 1][0]

    def _white_out(self, path: list[tuple[bytes, Node | None]], name: bytes) -> None:
        """Take away what lower layers gave: one name, or with an opaque whiteout all of them."""
        parent = path[-1][1] if path else self.root
        if parent is None or not parent.is_dir:
            return
        if name == _OPAQUE:
            self._empty(parent)
            return
        if name.startswith(_AUFS):
            return
        hidden = name.removeprefix(_WHITEOUT)
        if hidden in (b"", b".", b".."):
            raise TarError("a whiteout of no name")
        child = parent.children.get(hidden)
        if child is None:
            return
        if hidden not in self._touched.get(parent, ()):
            del parent.children[hidden]
        elif child.is_dir:
            self._empty(child)

    def _empty(self, directory: Node) -> None:
        """Remove all that lower layers gave below a directory."""
        todo = [directory]
        while todo:
            directory = todo.pop()
            if directory in self._own:
                continue
            self._own.add(directory)
            touched = self._touched.get(directory, set())
            directory.children = {n: c for n, c in directory.children.items() if n in touched}
            todo.extend(child for child in directory.children.values() if child.is_dir)


def _describe(node: Node, entry: Entry) -> None:
    """Give an inode the metadata of an entry of its type."""
    # Linux knows no permissions of symbolic links: stat(2) shows 0777.
    permissions = 0o777 if entry.type is EntryType.SYMLINK else entry.mode & 0o7777
    node.mode = _FORMATS[entry.type] | permissions
    node.uid = entry.uid
    node.gid = entry.gid
    node.mtime_ns = entry.mtime_ns
    node.xattrs = _kept_xattrs(entry) if entry.xattrs else {}


def _kept_xattrs(entry: Entry) -> dict[bytes, bytes]:
    kept = {}
    for name, value in entry.xattrs.items():
        if not _is_kept(name, entry.type):
            continue
        if len(name) > _MAX_XATTR_NAME:
            raise TarError(f"the extended attribute {quoted(name)} has a name of {len(name)} bytes")
        if len(value) > _MAX_XATTR_VALUE:
            raise UnsupportedError(f"its extended attribute {quoted(name)} has {len(value)} bytes")
        kept[name] = value
    return kept


def _is_kept(name: bytes, kind: EntryType) -> bool:
    if name == _ACL_ACCESS:
        return kind is not EntryType.SYMLINK
    if name == _ACL_DEFAULT:
        return kind is EntryType.DIRECTORY
    namespace, _, rest = name.partition(b".")
    if not rest or b"\0" in name:
        return False
    if namespace == b"user":
        return kind in (EntryType.REGULAR, EntryType.DIRECTORY)
    if namespace == b"trusted":
        return not rest.startswith(b"overlay.")
    return namespace == b"security"


def _extents(entry: Entry, layer: int) -> tuple[Extent, ...]:
    extents: list[Extent] = []
    for segment in entry.segments:
        start, raw, length = segment.file_offset, segment.raw_offset, segment.length
        if extents:
            last = extents[-1]
            if (last.file_offset + last.length, last.raw_offset + last.length) == (start, raw):
                extents[-1] = Extent(last.file_offset, layer, last.raw_offset, last.length + length)
                continue
        extents.append(Extent(start, layer, raw, length))
    return tuple(extents)


def _whole_blocks(entry: Entry) -> tuple[tuple[int, bytes], ...]:
    """Embedded data filled up with zeros to whole blocks, the last one up to the file's end."""
    runs: list[tuple[int, bytearray]] = []
    for offset, data in entry.embedded:
        block = offset - offset % BLOCK
        if not runs or block > runs[-1][0] + len(runs[-1][1]) + -len(runs[-1][1]) % BLOCK:
            runs.append((block, bytearray()))
        start, run = runs[-1]
        run += bytes(offset - start - len(run))
        run += data
    return tuple(
        (start, bytes(run.ljust(min(len(run) + -len(run) % BLOCK, entry.size - start), b"\0")))
        for start, run in runs
    )
