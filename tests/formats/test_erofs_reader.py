"""What servers rely on when they read an image in place."""

from __future__ import annotations

import mmap
import stat
from typing import TYPE_CHECKING

import pytest

from index.erofs.reader import Image, Piece
from index.erofs.writer import write
from index.errors import FormatError
from index.tree import Extent, Node
from tests.support.erofs_trees import assert_holds, directory, regular, symlink

if TYPE_CHECKING:
    from pathlib import Path

LARGE = {b"%05d" % n: regular(0, uid=n) for n in range(5000)}
LAYER = bytes(range(256)) * 4096


def child(image: Image, name: bytes) -> int:
    nid = image.lookup(image.root, name)
    assert nid is not None
    return nid


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_any_kind_of_buffer_will_do(kind: type) -> None:
    root = directory({b"a": regular(0, xattrs={b"user.a": b"b"}), b"l": symlink(b"a"), **LARGE})
    assert_holds(Image(kind(write(root, []))), root, [])


def test_a_mapped_file_will_do(tmp_path: Path) -> None:
    root = directory({b"a": regular(5, Extent(0, 0, 512, 5))})
    (tmp_path / "image").write_bytes(write(root, [len(LAYER)]))
    with (
        (tmp_path / "image").open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
    ):
        assert_holds(Image(mapped), root, [LAYER])


@pytest.mark.parametrize(
    "absent",
    [b"", b"0", b"0000", b"000001", b"~", b"\xff", b"99999", b"02500\0", b"x" * 255, b"x" * 999],
)
def test_names_that_are_not_there_are_not_found(absent: bytes) -> None:
    image = Image(write(directory(LARGE), []))
    assert image.lookup(image.root, absent) is None


def test_a_name_inside_of_other_names_is_told_from_them() -> None:
    names = [b"aaa", b"aaaa", b"baaa", b"aaab", b"zaa"]
    image = Image(write(directory({name: regular() for name in names}), []))
    for name in (b"a", b"aa", b"aab", b"b", b"ba", b"za", b"aaaba", b"aaabaaa"):
        assert image.lookup(image.root, name) is None
    assert len({child(image, name) for name in names}) == len(names)


def test_dot_and_dot_dot_are_found_and_not_listed() -> None:
    image = Image(write(directory({b"d": directory({b"-": regular()})}), []))
    nid = child(image, b"d")
    assert image.lookup(nid, b".") == nid
    assert image.lookup(nid, b"..") == image.root == image.lookup(image.root, b"..")
    assert [name for _, name, _, _ in image.readdir(nid)] == [b"-"]


def test_a_listing_goes_on_from_any_place() -> None:
    image = Image(write(directory(LARGE), []))
    listing = list(image.readdir(image.root))
    assert [name for _, name, _, _ in listing] == sorted(LARGE)
    assert len({place for place, *_ in listing}) == len(listing)
    for number in (0, 1, 17, 2500, 4998, 4999):
        assert list(image.readdir(image.root, listing[number][0])) == listing[number + 1 :]


def test_a_place_past_the_end_lists_nothing() -> None:
    image = Image(write(directory(LARGE), []))
    assert list(image.readdir(image.root, 1 << 62)) == []
    with pytest.raises(FormatError):
        list(image.readdir(image.root, -1))


def test_map_tells_holes_from_layers_and_from_its_own_bytes() -> None:
    node = Node(
        stat.S_IFREG,
        size=3000,
        extents=(Extent(512, 1, 1024, 1024),),
        embedded=((2560, b"e" * 440),),
    )
    image = Image(write(directory({b"f": node}), [512, 4096]))
    nid = child(image, b"f")
    hole, data, gap, own = image.map(nid, 0, 1 << 62)
    assert (hole, data, gap) == (
        Piece(0, None, 0, 512),
        Piece(512, 2, 1024, 1024),
        Piece(1536, None, 0, 1024),
    )
    assert (own.file_offset, own.device, own.length) == (2560, 0, 440)
    assert image.buffer[own.offset : own.offset + 440] == b"e" * 440
    assert image.map(nid, 1000, 100) == [Piece(1000, 2, 1512, 100)]


@pytest.mark.parametrize(("offset", "length"), [(3000, 1), (1 << 62, 1), (0, 0), (5, -5), (-1, 5)])
def test_map_of_nothing_is_empty(offset: int, length: int) -> None:
    image = Image(write(directory({b"f": regular(3000)}), []))
    assert image.map(child(image, b"f"), offset, length) == []


def test_empty_files_have_no_pieces() -> None:
    image = Image(write(directory({b"f": regular()}), []))
    assert image.map(child(image, b"f"), 0, 10) == []


def test_asking_an_inode_for_what_its_type_has_not_is_an_error() -> None:
    image = Image(write(directory({b"f": regular(), b"l": symlink(b"f")}), []))
    file, link = child(image, b"f"), child(image, b"l")
    with pytest.raises(FormatError):
        image.readlink(file)
    with pytest.raises(FormatError):
        image.lookup(link, b"x")
    with pytest.raises(FormatError):
        next(image.readdir(file))
    with pytest.raises(FormatError):
        image.map(image.root, 0, 1)


@pytest.mark.parametrize("nid", [-1, -(1 << 70), 1 << 20, 1 << 64, 1 << 90])
def test_inode_numbers_from_nowhere_are_errors(nid: int) -> None:
    image = Image(write(directory(), []))
    for ask in (image.inode, image.readlink, image.xattrs, image.has_xattrs):
        with pytest.raises(FormatError):
            ask(nid)
    with pytest.raises(FormatError):
        image.map(nid, 0, 1)
    with pytest.raises(FormatError):
        image.lookup(nid, b"a")


def test_images_of_other_tools_and_torn_images_are_refused() -> None:
    image = write(directory({b"f": regular(9, Extent(0, 0, 0, 9))}), [512])
    for torn in (b"", image[:1024], image[:1100], image[:-1], image[:-512], image + bytes(512)):
        with pytest.raises(FormatError):
            Image(torn)
    for offset in range(1024, 1024 + 128 + 128):
        damaged = bytearray(image)
        damaged[offset] ^= 0x40
        with pytest.raises(FormatError):
            Image(damaged)
