"""The additional layer store that podman and CRI-O ask for layers before they pull them.

    <store>/<reference in base64>/<digest>/diff    the layer's own tree
                                          /info    containers/storage's record of the layer, JSON
                                          /blob    the layer as it is in the registry
                                          /use     never exists

`<digest>` is the layer's (containers/storage before 1.54) or that of its table of contents. Whoever
uses a layer creates `use`, and removes `<digest>` when done: both are told that there is no such
file, and counted. Source: containers/storage `drivers/overlay/overlay.go`, `layers.go`.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import stat
import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from index.erofs.reader import Inode
from index.errors import FirstByteError, FormatError
from snapshotter.fuse.live import LiveView
from snapshotter.registry.digests import check_digest
from snapshotter.registry.reference import Reference

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from index.erofs.reader import Piece
    from snapshotter.fuse.live import Call
    from snapshotter.fuse.view import Data, View

_ROOT = 1
_MADE_UP = 1 << 39  # inode numbers above are hashes of what they stand for
_REMEMBERED = 4096  # inodes; one that is forgotten is looked up again
_DIRECTORY = stat.S_IFDIR | 0o755
_FILE = stat.S_IFREG | 0o444
_INFO = b"info"
_USE = b"use"


class StoredLayer(Protocol):
    """A layer that can be served."""

    @property
    def tree(self) -> View: ...
    @property
    def blob(self) -> View: ...
    def info(self, digest: str) -> bytes: ...


class Layers(Protocol):
    """Where they come from. Methods raise FirstByteError."""

    def known(self, reference: str, digest: str) -> StoredLayer | None:
        """A layer that is open."""

    async def find(self, reference: str, digest: str) -> StoredLayer | None:
        """A layer of an image, opened if it is not, or None if it is to be pulled as ever."""

    def has_counted(self, call: Call) -> bool:
        """Whether a predecessor has counted a call."""

    async def retain(self, reference: str, digest: str, call: Call) -> None:
        """Somebody uses a layer; it is on disk when this returns."""

    async def release(self, reference: str, digest: str, call: Call) -> None:
        """Somebody does not use it any more; as `retain`."""


@dataclass(frozen=True)
class _Node:
    """A directory or file: `reference` alone, with `digest`, and with a file's name."""

    reference: str = ""
    digest: str = ""
    name: bytes = b""

    @property
    def nid(self) -> int:
        if not self.reference:
            return _ROOT
        words = b"\0".join((self.reference.encode(), self.digest.encode(), self.name))
        hashed = int.from_bytes(hashlib.sha256(words).digest()[:8], "big")
        return _MADE_UP | hashed & (_MADE_UP - 1)


class LayerStoreView(LiveView):
    """The store, as a view of the FUSE mount."""

    def __init__(self, *, name: bytes, slot: int, layers: Layers) -> None:
        self._nodes: OrderedDict[int, _Node] = OrderedDict()
        self._source = layers
        self._changed_ns = time.time_ns()
        super().__init__(
            name=name,
            slot=slot,
            reference="podman's layer store",
            image=_Nodes(self),
            layers=(),
            raw_size=0,
        )

    def expect(self, reference: str, digests: Iterable[str]) -> None:
        """Know the inodes of an image's layers, which a predecessor may have given out. Paths that
        are stale are looked up again, but files that are open are not."""
        self._add(_Node(reference))
        for digest in digests:
            self._add(_Node(reference, digest))
            self._add(_Node(reference, digest, _INFO))

    def knows(self, nid: int) -> bool:
        return nid == _ROOT or nid in self._nodes

    async def find(self, nid: int, name: bytes) -> tuple[View, int] | None:
        parent = self._node(nid)
        if not parent.reference:
            reference = decode_reference(name)
            return None if reference is None else (self, self._add(_Node(reference)))
        if not parent.digest:
            digest = _digest(name)
            if digest is None or await self._source.find(parent.reference, digest) is None:
                return None
            return self, self._add(_Node(parent.reference, digest))
        layer = await self._source.find(parent.reference, parent.digest)
        if layer is None:
            return None
        if name == b"diff":
            return layer.tree, layer.tree.image.root
        if name == b"blob":
            return layer.blob, layer.blob.image.root
        if name == _INFO:
            return self, self._add(_Node(parent.reference, parent.digest, name))
        return None

    def entries(self, nid: int) -> Iterable[tuple[bytes, View, int]]:
        node = self._node(nid)
        if not node.reference:
            references = {one.reference for one in self._nodes.values()}
            return [
                (encode_reference(one), self, self._add(_Node(one))) for one in sorted(references)
            ]
        if not node.digest:
            mine = {one.digest for one in self._nodes.values() if one.reference == node.reference}
            made = [_Node(node.reference, digest) for digest in sorted(mine) if digest]
            return [(one.digest.encode(), self, self._add(one)) for one in made]
        layer = self._source.known(node.reference, node.digest)
        if layer is None:
            return []
        return [
            (b"blob", layer.blob, layer.blob.image.root),
            (b"diff", layer.tree, layer.tree.image.root),
            (_INFO, self, self._add(_Node(node.reference, node.digest, _INFO))),
        ]

    def has_noticed(self, call: Call) -> bool:
        return self._source.has_counted(call)

    async def noticed_create(self, nid: int, name: bytes, call: Call) -> bool:
        node = self._node(nid)
        if not node.digest or name != _USE:
            return False
        await self._source.retain(node.reference, node.digest, call)
        return True

    async def noticed_rmdir(self, nid: int, name: bytes, call: Call) -> bool:
        node = self._node(nid)
        digest = _digest(name)
        if not node.reference or node.digest or digest is None:
            return False
        await self._source.release(node.reference, digest, call)
        return True

    async def read(self, nid: int, offset: int, size: int) -> Data:
        node = self._node(nid)
        return self._layer(node).info(node.digest)[offset : offset + size]

    def inode(self, nid: int) -> Inode:
        """As of `Tree`."""
        node = self._node(nid)
        if not node.name:
            return Inode(nid, _DIRECTORY, 0, 0, 0, self._changed_ns, 2, (0, 0))
        size = len(self._layer(node).info(node.digest))
        return Inode(nid, _FILE, 0, 0, size, 0, 1, (0, 0))

    def parent(self, nid: int) -> int:
        """The directory above one."""
        node = self._node(nid)
        return self._add(_Node(node.reference if node.digest else ""))

    def _layer(self, node: _Node) -> StoredLayer:  # type: ignore[override]
        layer = self._source.known(node.reference, node.digest)
        if layer is None:
            raise FirstByteError(f"layer {node.digest} of {node.reference} is not served any more")
        return layer

    def _node(self, nid: int) -> _Node:
        if nid == _ROOT:
            return _Node()
        try:
            return self._nodes[nid]
        except KeyError:
            raise FormatError(f"inode {nid} is not in the layer store") from None

    def _add(self, node: _Node) -> int:
        nid = node.nid
        if nid == _ROOT:
            return nid
        known = self._nodes.get(nid)
        if known is None:
            self._nodes[nid] = node
            self._changed_ns = max(time.time_ns(), self._changed_ns + 1)
            if len(self._nodes) > _REMEMBERED:
                self._nodes.popitem(last=False)
        elif known != node:  # two in 2^39
            raise FirstByteError(f"{node} and {known} have the same inode number")
        else:
            self._nodes.move_to_end(nid)
        return nid


class _Nodes:
    """The store's own directories and files, as a `Tree`."""

    root = _ROOT
    inode_count = 1
    buffer = b""

    def __init__(self, view: LayerStoreView) -> None:
        self._view = view

    def inode(self, nid: int) -> Inode:
        return self._view.inode(nid)

    def lookup(self, nid: int, name: bytes) -> int | None:
        return self._view.parent(nid) if name == b".." else None

    def readdir(self, nid: int, start: int = 0) -> Iterator[tuple[int, bytes, int, int]]:
        return iter(())

    def readlink(self, nid: int) -> bytes:
        raise FormatError(f"inode {nid} is not a symlink")

    def has_xattrs(self, nid: int) -> bool:
        return False

    def xattrs(self, nid: int) -> dict[bytes, bytes]:
        return {}

    def map(self, nid: int, offset: int, length: int) -> list[Piece]:
        return []


def encode_reference(reference: str) -> bytes:
    """The name of an image's directory."""
    return base64.b64encode(reference.encode())


def decode_reference(name: bytes) -> str | None:
    """The reference that a directory's name stands for; None if it is none."""
    try:
        text = base64.b64decode(name, validate=True).decode()
        return text if str(Reference.parse(text)) == text else None
    except (binascii.Error, UnicodeDecodeError, FirstByteError):
        return None


def _digest(name: bytes) -> str | None:
    try:
        return check_digest(name.decode())
    except (UnicodeDecodeError, FirstByteError):
        return None
