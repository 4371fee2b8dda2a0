"""What the writer promises: the same bytes for the same tree, little space, and clear refusals."""

from __future__ import annotations

import stat
from typing import TYPE_CHECKING, TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from index.erofs import chunks
from index.erofs.reader import Image
from index.erofs.validate import validate
from index.erofs.writer import write
from index.errors import UnsupportedError
from index.tree import Extent, Node
from tests.support.erofs_trees import (
    DEVICES,
    LAYERS,
    assert_holds,
    directory,
    regular,
    symlink,
    trees,
)

if TYPE_CHECKING:
    import random

T = TypeVar("T")


def image_of(children: dict[bytes, Node], devices: tuple[int, ...] = (1 << 20,)) -> Image:
    return Image(write(directory(children), devices))


@settings(max_examples=150)
@given(trees())
def test_an_image_holds_its_tree_and_is_valid(root: Node) -> None:
    image = Image(write(root, DEVICES))
    validate(image, DEVICES)
    assert_holds(image, root, LAYERS)


def shuffled(mapping: dict[bytes, T], order: random.Random) -> dict[bytes, T]:
    items = list(mapping.items())
    order.shuffle(items)
    return dict(items)


@settings(max_examples=50)
@given(trees(), st.randoms(use_true_random=False))
def test_bytes_do_not_depend_on_the_order_of_dictionaries(root: Node, order: random.Random) -> None:
    before = write(root, DEVICES)
    stack = [root]
    while stack:
        node = stack.pop()
        stack.extend(node.children.values())
        node.children = shuffled(node.children, order)
        node.xattrs = shuffled(node.xattrs, order)
    assert write(root, DEVICES) == before


def test_uuid_tells_images_apart() -> None:
    one, two = write(directory(uid=1), []), write(directory(uid=2), [])
    assert one[1024 + 48 :][:16] != two[1024 + 48 :][:16]


def test_a_file_costs_no_more_than_96_bytes_and_its_name() -> None:
    files = {b"file%06d" % n: regular(700, Extent(0, 0, n * 1024, 700)) for n in range(10_000)}
    image = write(directory(files), [10_000 * 1024])
    assert len(image) < 10_000 * (96 + 12 + 10) * 1.05


def test_inodes_of_a_directory_are_neighbours() -> None:
    children = {
        b"d%d" % n: directory({b"f%d" % m: regular() for m in range(50)}) for n in range(20)
    }
    image = image_of(children)
    for name in children:
        nid = image.lookup(image.root, name)
        assert nid is not None
        nids = [child for _, _, child, _ in image.readdir(nid)]
        assert max(nids) - min(nids) == 2 * 49


def test_a_value_that_many_inodes_have_is_written_once() -> None:
    label = b"a security label that is long enough to matter"
    image = image_of(
        {b"%d" % n: regular(0, xattrs={b"security.label": label}) for n in range(1000)}
    )
    assert bytes(image.buffer).count(label) == 1


def test_a_value_that_one_inode_has_stays_with_it() -> None:
    image = image_of({b"a": regular(0, nlink=1, xattrs={b"user.a": b"long" * 9})})
    assert image.xattr_start == len(image.buffer)


@pytest.mark.parametrize(
    ("size", "chunk", "pieces"),
    [
        (1, 1 << 40, [chunks.Piece(0, 1, 1, 0)]),
        (1 << 40, 1 << 40, [chunks.Piece(0, 1 << 40, 1, 7)]),
        ((1 << 40) + 1, 1 << 40, [chunks.Piece(0, (1 << 40) + 1, 1, 7)]),
        (1 << 50, 1 << 40, []),
        (4096, 1 << 40, [chunks.Piece(0, 512, 1, 3), chunks.Piece(512, 3584, 1, 4)]),
        (4096, 2048, [chunks.Piece(0, 2048, 1, 3), chunks.Piece(2048, 2048, 2, 7)]),
        (4096, 512, [chunks.Piece(3584, 512, 1, 3)]),
        (4097, 4096, [chunks.Piece(4096, 1, 1, 3)]),
        (9 << 30, 8 << 30, [chunks.Piece(8 << 30, 1 << 30, 1, 3)]),
    ],
)
def test_chunks_are_as_large_as_the_pieces_allow(
    size: int, chunk: int, pieces: list[chunks.Piece]
) -> None:
    chunk_format, indices = chunks.encode(size, pieces)
    assert 512 << (chunk_format & 31) == chunk
    assert len(indices) == 8 * -(-size // chunk)


def test_writing_does_not_recurse() -> None:
    root = bottom = directory()
    for _ in range(20_000):
        bottom.children[b"d"] = below = directory()
        bottom.nlink = 3
        bottom = below
    image = Image(write(root, []))
    validate(image, [])
    assert image.inode_count == 20_001


@pytest.mark.parametrize(
    ("node", "complaint"),
    [
        (regular(0, xattrs={b"user.big": bytes(65536)}), "65536 bytes"),
        (
            regular(0, xattrs={b"user.%d" % n: bytes(60_000) for n in range(5)}),
            "bytes of extended attributes",
        ),
        (regular(0, xattrs={b"user.": b""}), "no namespace"),
        (regular(0, xattrs={b"com.example": b""}), "no namespace"),
        (regular(0, xattrs={b"system.posix_acl_access2": b""}), "no namespace"),
        (regular(0, xattrs={b"user." + b"n" * 251: b""}), "name that Linux does not allow"),
        (regular(0, xattrs={b"user.a\0b": b""}), "name that Linux does not allow"),
        (symlink(b""), "target of 0 bytes"),
        (symlink(b"x" * 4096), "target of 4096 bytes"),
        (symlink(b"x\0y"), "without NUL"),
        (Node(stat.S_IFCHR, rdev=(4096, 0)), "4096:0"),
        (Node(stat.S_IFBLK, rdev=(0, 1 << 20)), "0:1048576"),
        (Node(0o644), "no file type"),
        (regular(0, uid=1 << 32), "out of range"),
        (regular(0, mtime_ns=10**9 << 63), "out of range"),
        (regular(1 << 63), "out of range"),
        (regular(512, Extent(0, 1, 0, 512)), "outside of layer 1"),
        (regular(512, Extent(0, 0, 1 << 20, 512)), "outside of layer 0"),
        (regular(512, Extent(0, 0, 100, 512)), "not on a block"),
        (regular(1024, Extent(512, 0, 100, 512)), "not on a block"),
        (regular(1024, Extent(100, 0, 512, 512)), "not in blocks"),
        (regular(1024, Extent(0, 0, 0, 1024), Extent(512, 0, 0, 512)), "overlaps"),
        (regular(512, Extent(512, 0, 0, 512)), "ends before"),
        (regular(1 << 40, Extent(512, 0, 0, 512)), "chunks"),
    ],
)
def test_what_erofs_cannot_hold_is_refused_with_its_path(node: Node, complaint: str) -> None:
    root = directory({b"etc": directory({b"odd": node})})
    with pytest.raises(UnsupportedError, match=complaint) as caught:
        write(root, [1 << 20])
    assert caught.value.message.startswith("/etc/odd: ")


@pytest.mark.parametrize("name", [b"", b".", b"..", b"a/b", b"a\0b", b"n" * 256])
def test_names_that_cannot_be_are_refused(name: bytes) -> None:
    root = directory({b"etc": directory({name: regular(), b"fine": regular()})})
    with pytest.raises(UnsupportedError, match="/etc: "):
        write(root, [])


def test_too_many_or_too_large_layers_are_refused() -> None:
    write(directory(), [512 * 0xFFFF_FFFF])
    with pytest.raises(UnsupportedError, match="2 TiB"):
        write(directory(), [512 * 0xFFFF_FFFF + 1])
    image = Image(write(directory(), [512] * 0xFFFF))
    assert len(image.device_blocks) == 0xFFFF
    with pytest.raises(UnsupportedError, match="65536 layers"):
        write(directory(), [512] * 0x10000)
