"""Views without a mount: inode numbers, and files put together from pieces."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from index.errors import FirstByteError, FormatError
from index.tree import Extent, Node
from snapshotter.fuse.view import MAX_SLOT, View, Views, pack_inode, unpack_inode
from tests.support.serving import MemoryLayer, directory, regular, view_of

BLOCK = 512


@given(slot=st.integers(0, MAX_SLOT), nid=st.integers(0, (1 << 40) - 1))
def test_an_inode_number_tells_slot_and_nid(slot: int, nid: int) -> None:
    inode = pack_inode(slot, nid)
    assert inode < 1 << 64
    assert unpack_inode(inode) == (slot, nid)


def test_a_nid_that_would_spill_into_the_slot_is_refused() -> None:
    with pytest.raises(FormatError):
        pack_inode(1, 1 << 40)


def file_in_pieces(*, local: bool) -> tuple[View, int, bytes, list[MemoryLayer]]:
    """A file of two layers' blocks, a hole, and a block inside the index."""
    layers = [
        MemoryLayer(bytes([1]) * 4 * BLOCK, local=True),
        MemoryLayer(bytes(range(256)) * 8, local=local),
    ]
    extents = (
        Extent(0, 1, 2 * BLOCK, BLOCK),
        Extent(BLOCK, 0, 0, 2 * BLOCK),
        # a hole of one block
        Extent(4 * BLOCK, 1, 0, 2 * BLOCK),
        # a block of embedded data
        Extent(7 * BLOCK, 1, 3 * BLOCK, 100),
    )
    node = Node(0o100644, size=7 * BLOCK + 100, extents=extents)
    embedded = b"e" * BLOCK
    node.embedded = ((6 * BLOCK, embedded),)
    second = layers[1].data
    content = (
        second[2 * BLOCK : 3 * BLOCK]
        + layers[0].data[: 2 * BLOCK]
        + bytes(BLOCK)
        + second[: 2 * BLOCK]
        + embedded
        + second[3 * BLOCK : 3 * BLOCK + 100]
    )
    view = view_of(directory({b"f": node}), layers)
    nid = view.image.lookup(view.image.root, b"f")
    assert nid is not None
    return view, nid, content, layers


@given(offset=st.integers(0, 5000), size=st.integers(0, 5000))
def test_pieces_are_joined_and_cut_at_the_end(offset: int, size: int) -> None:
    view, nid, content, _ = file_in_pieces(local=True)
    data = view.read_now(nid, offset, size)
    assert data is not None
    assert bytes(data) == content[offset : offset + size]


async def test_what_is_not_local_is_fetched_and_the_rest_is_not() -> None:
    view, nid, content, layers = file_in_pieces(local=False)
    assert view.read_now(nid, 0, len(content)) is None
    assert bytes(await view.read(nid, 0, len(content))) == content
    assert layers[0].fetches == []
    assert sorted(layers[1].fetches) == [(0, 1024), (1024, 512), (1536, 100)]


async def test_a_failed_fetch_is_raised_as_it_is() -> None:
    view, nid, content, layers = file_in_pieces(local=False)
    layers[1].failing = True
    with pytest.raises(FirstByteError, match="the registry is away"):
        await view.read(nid, 0, len(content))


def test_views_are_listed_by_slot_and_a_listing_can_be_continued() -> None:
    views = Views()
    made = [
        view_of(directory({b"f": regular(0)}), [], slot=slot, name=name)
        for slot, name in ((3, b"c"), (1, b"b"), (2, b"a"))
    ]
    for view in made:
        views.add(view)
    assert [view.slot for view in views.after(0)] == [1, 2, 3]
    assert [view.slot for view in views.after(1)] == [2, 3]
    views.remove(made[2])
    assert [view.slot for view in views.after(0)] == [1, 3]
    assert views.named(b"a") is None
    assert views.in_slot(2) is None
    assert views.named(b"c") is made[0]


async def test_a_view_that_refuses_serves_nothing_any_more() -> None:
    view, nid, content, _ = file_in_pieces(local=True)
    view.refusal = FirstByteError("the index lies")
    with pytest.raises(FirstByteError, match="the index lies"):
        view.read_now(nid, 0, len(content))
