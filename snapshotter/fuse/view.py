"""Views: the images that the daemon's one FUSE mount shows, and where a file's bytes come from.

Nothing here knows FUSE; `answers`, `reads` and `operations` turn requests of the kernel into calls
of this.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Protocol

from index.errors import FirstByteError, FormatError
from snapshotter.nursery import open_nursery

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from index.erofs.reader import Buffer, Inode, Piece

Data = bytes | memoryview

# An inode number of the mount is a view's slot and a nid of its EROFS image. A nid counts 32-byte
# units of the metadata area; 40 bits are 32 TiB of it. Slot 0 is the mount's own root directory.
NID_BITS = 40
NID_MASK = (1 << NID_BITS) - 1
MAX_SLOT = (1 << (64 - NID_BITS)) - 1


def pack_inode(slot: int, nid: int) -> int:
    """The inode number of `nid` in the view of `slot`. Raises FormatError for an absurd nid."""
    if not 0 <= nid <= NID_MASK:
        raise FormatError(f"inode {nid} lies further in the image than any image reaches")
    return slot << NID_BITS | nid


def unpack_inode(inode: int) -> tuple[int, int]:
    """(slot, nid) of an inode number."""
    return inode >> NID_BITS, inode & NID_MASK


class RawSpace(Protocol):
    """A layer's raw space, as the fetch room offers it. Offsets and lengths are in bytes."""

    def read_now(self, offset: int, length: int) -> Data | None:
        """The bytes if all of them are on this node, else None. Never waits for the network."""

    async def read(self, offset: int, length: int) -> Data:
        """The bytes, fetched if they have to be. Raises FirstByteError."""


class Tree(Protocol):
    """What a view shows, as `index.erofs.reader.Image` documents it."""

    @property
    def root(self) -> int: ...
    @property
    def inode_count(self) -> int: ...
    @property
    def buffer(self) -> Buffer: ...
    def inode(self, nid: int) -> Inode: ...
    def lookup(self, nid: int, name: bytes) -> int | None: ...
    def readdir(self, nid: int, start: int = 0) -> Iterator[tuple[int, bytes, int, int]]: ...
    def readlink(self, nid: int) -> bytes: ...
    def has_xattrs(self, nid: int) -> bool: ...
    def xattrs(self, nid: int) -> dict[bytes, bytes]: ...
    def map(self, nid: int, offset: int, length: int) -> list[Piece]: ...


class View:
    """One entry of the mount's root: the tree of an image, or a flat file.

    `name` is the entry in the mount's root; `slot` names the view in inode numbers and is
    1 … MAX_SLOT. `reference` is what log lines call it. `raw_size` is
    the bytes of all layers' raw spaces. A `refusal` that is set is what
    every read raises from then on. The view owns neither image nor layers.
    """

    def __init__(
        self,
        *,
        name: bytes,
        slot: int,
        reference: str,
        image: Tree,
        layers: Sequence[RawSpace],
        raw_size: int,
    ) -> None:
        self.name = name
        self.slot = slot
        self.reference = reference
        self.image = image
        self.raw_size = raw_size
        self.refusal: FirstByteError | None = None
        self._layers = layers

    def read_now(self, nid: int, offset: int, size: int) -> Data | None:
        """Bytes of a regular file, short at its end, or None if some are not on this node yet.

        This is the path of nearly every read of a started container, so it is not async: a task
        switch would cost as much as all the rest.
        """
        if self.refusal is not None:
            raise self.refusal
        parts: list[Data] = []
        for piece in self.image.map(nid, offset, size):
            part = self._read_piece_now(piece)
            if part is None:
                return None
            parts.append(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    async def read(self, nid: int, offset: int, size: int) -> Data:
        """Bytes of a regular file, short at its end, fetched if they have to be.

        Raises FirstByteError. Pieces that lie apart are fetched at the same time; the kernel asks
        for 1 MiB at most, so that is also the most that waits in memory.
        """
        parts: dict[int, Data] = {}

        async def fetch(number: int, piece: Piece) -> None:
            parts[number] = await self._layer(piece).read(piece.offset, piece.length)

        pieces = self.image.map(nid, offset, size)
        async with open_nursery() as nursery:
            for number, piece in enumerate(pieces):
                part = self._read_piece_now(piece)
                if part is None:
                    nursery.start_soon(fetch, number, piece)
                else:
                    parts[number] = part
        return (
            parts[0] if len(pieces) == 1 else b"".join(map(parts.__getitem__, range(len(pieces))))
        )

    def _read_piece_now(self, piece: Piece) -> Data | None:
        if piece.device is None:
            return bytes(piece.length)
        if piece.device == 0:
            return bytes(self.image.buffer[piece.offset : piece.offset + piece.length])
        return self._layer(piece).read_now(piece.offset, piece.length)

    def _layer(self, piece: Piece) -> RawSpace:
        assert piece.device
        return self._layers[piece.device - 1]


class Views:
    """The views of the mount, by name and by slot, and when that set last changed."""

    def __init__(self) -> None:
        self._by_name: dict[bytes, View] = {}
        self._by_slot: dict[int, View] = {}
        self.changed_ns = time.time_ns()
        """When the set last changed, since the epoch; another number after each change."""
        self.requests = 0
        """Requests of the kernel so far, whatever they were about."""

    def add(self, view: View) -> None:
        """Show a view from now on.

        A slot must never have been used in this mount before: the kernel keeps names and pages by
        inode number for as long as it likes.
        """
        assert 1 <= view.slot <= MAX_SLOT
        assert view.name not in self._by_name
        assert view.slot not in self._by_slot
        self._by_name[view.name] = view
        self._by_slot[view.slot] = view
        self._note_change()

    def remove(self, view: View) -> None:
        """Stop showing a view; what the kernel still asks about it is answered with ESTALE."""
        del self._by_name[view.name]
        del self._by_slot[view.slot]
        self._note_change()

    def _note_change(self) -> None:
        self.changed_ns = max(time.time_ns(), self.changed_ns + 1)

    def named(self, name: bytes) -> View | None:
        return self._by_name.get(name)

    def in_slot(self, slot: int) -> View | None:
        return self._by_slot.get(slot)

    def after(self, slot: int) -> Iterator[View]:
        """The views of higher slots than `slot`, in order: a listing that can be continued."""
        return (self._by_slot[number] for number in sorted(self._by_slot) if number > slot)

    def __len__(self) -> int:
        return len(self._by_slot)

    def __iter__(self) -> Iterator[View]:
        return iter(self._by_slot.values())
