"""The validator finds every broken rule, and what it lets pass can be walked to the end."""

from __future__ import annotations

import dataclasses
import stat
from typing import TYPE_CHECKING, Any, TypeAlias

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from index.erofs.layout import DIRENT, INODE, SLOT_SIZE
from index.erofs.reader import Image
from index.erofs.superblock import Superblock
from index.erofs.validate import validate
from index.erofs.writer import write
from index.errors import FormatError
from index.tree import Extent, Node
from tests.support.erofs_trees import DEVICES, LAYERS, directory, read, regular, symlink, trees

if TYPE_CHECKING:
    from collections.abc import Callable

SIZES = DEVICES
_SHARED = regular(0, nlink=2, xattrs={b"user.a": b"1", b"user.b": b"2"})
TREE = directory(
    {
        b"dir": directory({b"below": directory(), b"hard": _SHARED}),
        b"file": regular(9000, Extent(0, 2, 0, 9000)),
        b"hard": _SHARED,
        b"link": symlink(b"target"),
        b"long": symlink(b"long" * 200),
        b"own": Node(stat.S_IFREG, size=8192, embedded=((0, b"own " * 2048),)),
        b"null": Node(stat.S_IFCHR, rdev=(1, 3)),
        b"pipe": Node(stat.S_IFIFO),
        b"sparse": regular(4096, Extent(2048, 0, 0, 2048)),
    }
)
IMAGE = write(TREE, SIZES)

Damage: TypeAlias = "Callable[[bytearray, Image], None]"


def nid_of(image: Image, path: bytes) -> int:
    nid: int | None = image.root
    for name in path.split(b"/"):
        if name:
            assert nid is not None
            nid = image.lookup(nid, name)
    assert nid is not None
    return nid


def inode(path: bytes, **fields: int) -> Damage:
    """Set fields of an inode: offset and size by name, as in `layout.INODE`."""
    places = {
        "format": (0, 2), "xattrs": (2, 2), "mode": (4, 2), "size": (8, 8), "union": (16, 4),
        "nanoseconds": (40, 4), "nlink": (44, 4), "high": (64, 2), "device": (66, 2),
        "block": (68, 4), "xattr_prefix": (64 + 12 + 1, 1), "xattr_name": (64 + 12, 1),
        "second_name": (64 + 12 + 12, 1), "shared": (64 + 4, 1),
    }  # fmt: skip

    def damage(data: bytearray, image: Image) -> None:
        position = image.meta_start + nid_of(image, path) * SLOT_SIZE
        for name, value in fields.items():
            offset, size = places[name]
            data[position + offset : position + offset + size] = value.to_bytes(size, "little")

    return damage


def entry(path: bytes, **fields: int | bytes | str) -> Damage:
    """Change the directory entry of a path: `to` the inode of another path, `dtype`, `name`."""

    def damage(data: bytearray, image: Image) -> None:
        parent, _, name = path.rpartition(b"/")
        (block,) = (block for _, block in image.directory_blocks(nid_of(image, parent)))
        at = data.index(block)
        entries = list(DIRENT.iter_unpack(block[: DIRENT.unpack_from(block)[1]]))
        for number, (nid, offset, dtype) in enumerate(entries):
            if block.startswith(name, offset) and nid == nid_of(image, path):
                to = fields.get("to")
                DIRENT.pack_into(
                    data,
                    at + number * DIRENT.size,
                    nid_of(image, to) if isinstance(to, bytes) else nid,
                    offset,
                    fields.get("dtype", dtype),
                )
                new = fields.get("name", name)
                assert isinstance(new, bytes)
                data[at + offset : at + offset + len(new)] = new

    return damage


def replace(old: bytes, new: bytes) -> Damage:
    def damage(data: bytearray, image: Image) -> None:
        assert data.count(old) == 1
        at = data.index(old)
        data[at : at + len(old)] = new

    return damage


def superblock(**fields: Any) -> Damage:
    def damage(data: bytearray, image: Image) -> None:
        head = dataclasses.replace(Superblock.parse(data), **fields).pack()
        data[: len(head)] = head

    return damage


def test_what_the_writer_writes_is_valid() -> None:
    validate(Image(IMAGE), SIZES)


@pytest.mark.parametrize(
    "devices", [(), SIZES[:2], (40960, 0, 9729), (9000, 0, 40960), (*SIZES, 1)]
)
def test_an_image_is_only_valid_for_its_layers(devices: tuple[int, ...]) -> None:
    with pytest.raises(FormatError):
        validate(Image(IMAGE), devices)


def test_a_file_may_not_end_after_its_layer_inside_a_block() -> None:
    with pytest.raises(FormatError, match="outside of device"):
        validate(Image(IMAGE), (40960, 0, 8999))


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (superblock(inode_count=99), "claims 99"),
        (superblock(root=1), "inode"),
        (superblock(root=0xFFFF), "outside of the image"),
        (inode(b"/", nlink=2), "link count 2"),
        (inode(b"/dir/below", nlink=3), "link count 3"),
        (inode(b"/dir", mode=0o100644), "listed as type"),
        (inode(b"/pipe", mode=0), "listed as type"),
        (inode(b"/file", nlink=2), "names less"),
        (inode(b"/file", nlink=0), "link count 0"),
        (inode(b"/hard", nlink=1), "more names"),
        (inode(b"/hard", nlink=3), "names less"),
        (inode(b"/file", format=0), "format"),
        (inode(b"/file", format=3), "format"),
        (inode(b"/file", size=9001), "outside of device 3"),
        (inode(b"/file", size=1 << 63), "out of range"),
        (inode(b"/file", size=1 << 62), "outside of"),
        (inode(b"/file", device=4), "outside of device 4"),
        (inode(b"/file", device=1, block=80), "outside of device 1"),
        (inode(b"/file", device=0, block=0xFFFFFFFE), "outside of device 0"),
        (inode(b"/file", device=2), "outside of device 2"),
        (inode(b"/file", high=1), "outside of device"),
        (inode(b"/file", union=31), "chunk format"),
        (inode(b"/file", union=0x60), "chunk format"),
        (inode(b"/file", nanoseconds=10**9), "out of range"),
        (inode(b"/sparse", size=1 << 40), "outside of the image"),
        (inode(b"/pipe", union=1), "has data"),
        (inode(b"/pipe", size=1), "has data"),
        (inode(b"/null", format=9), "format"),
        (inode(b"/link", size=0), "0 bytes"),
        (inode(b"/link", size=600), "NUL"),
        (inode(b"/long", size=4096), "4096"),
        (inode(b"/long", union=0xFFFFFFF0), "outside of the image"),
        (inode(b"/dir", size=0), "0 bytes"),
        (inode(b"/dir", size=4), "no entries"),
        (inode(b"/dir", size=512), "crosses"),
        (inode(b"/dir", size=1 << 40), "outside of the image|crosses"),
        (inode(b"/hard", xattrs=1), "no xattrs"),
        (inode(b"/hard", xattrs=2), "entry"),
        (inode(b"/hard", xattrs=0xFFFF), "outside of the image"),
        (inode(b"/hard", xattr_prefix=5), "unknown prefix"),
        (inode(b"/hard", xattr_prefix=2), "has the name"),
        (inode(b"/hard", xattr_name=0), "has the name"),
        (inode(b"/hard", xattr_name=255), "runs past"),
        (inode(b"/hard", shared=1), "runs past|prefix|name"),
        (inode(b"/hard", shared=255), "shared entries"),
        (replace(b"target", b"tar\0et"), "NUL"),
        (replace(b"\x01\x01\x01\0b2", b"\x01\x01\x01\0a2"), "twice"),
        (entry(b"/file", name=b"fi/e"), "slash"),
        (entry(b"/file", name=b"fi\0e"), "NUL"),
        (entry(b"/file", name=b"zile"), "not in order"),
        (entry(b"/link", name=b"file"), "not in order"),
        (entry(b"/file", dtype=2), "2 subdirectories"),
        (entry(b"/file", dtype=0), "listed as type 0"),
        (entry(b"/hard", dtype=3), "types|listed"),
        (entry(b"/file", to=b"/pipe"), "listed as type"),
        (entry(b"/dir/hard", to=b"/file"), "more names|names less"),
        (entry(b"/dir/below", to=b"/"), "more names"),
        (entry(b"/dir/below", to=b"/dir"), "more names"),
        (entry(b"/dir/.", to=b"/"), "leads to"),
        (entry(b"/dir/..", to=b"/dir"), "leads to"),
        (entry(b"/dir/..", name=b".-"), "more names"),
        (entry(b"/dir/.", dtype=1), "more names"),
    ],
)
def test_a_broken_rule_is_found(damage: Damage, complaint: str) -> None:
    data = bytearray(IMAGE)
    damage(data, Image(IMAGE))
    assert data != IMAGE
    with pytest.raises(FormatError, match=complaint):
        validate(Image(data), SIZES)


def test_directories_cannot_share_their_entries() -> None:
    """Or a small image could hold a thousand directories of a million names, all true."""
    file = regular(0, nlink=60 * 300)
    names = {b"!%04d" % number: file for number in range(300)}
    data = write(directory({b"d%02d" % number: directory(names) for number in range(60)}), [])
    image = Image(data)
    validate(image, [])
    nids = [nid for _, _, nid, _ in image.readdir(image.root)]
    # Let all of them have the whole blocks of the first, and take those of the others out.
    head, first, whole = Superblock.parse(data), 1536 + 512, 300 * 18 // 512 * 512
    kept = bytearray(data[: first + whole] + data[image.meta_start :])
    cut = (len(data) - len(kept)) // 512
    moved = dataclasses.replace(
        head,
        blocks=head.blocks - cut,
        meta_block=head.meta_block - cut,
        xattr_block=head.xattr_block - cut,
    )
    kept[:1536] = moved.pack()
    for nid in nids:
        at = (head.meta_block - cut) * 512 + nid * SLOT_SIZE + 16
        kept[at : at + 4] = (first // 512).to_bytes(4, "little")
    shared = Image(kept)
    assert all(len(list(shared.readdir(nid))) == 300 for nid in nids)
    with pytest.raises(FormatError, match="on top of each other"):
        validate(shared, [])


def walk_everything(image: Image) -> None:
    """Do everything that a server would do with a valid image."""
    stack = [image.root]
    while stack:
        nid = stack.pop()
        found = image.inode(nid)
        image.xattrs(nid)
        if stat.S_ISDIR(found.mode):
            for _, name, child, dtype in image.readdir(nid):
                assert image.lookup(nid, name) == child
                assert dtype == {0o4: 2, 0o10: 1, 0o12: 7}.get(image.inode(child).mode >> 12, dtype)
                stack.append(child)
        elif stat.S_ISLNK(found.mode):
            assert image.readlink(nid)
        elif stat.S_ISREG(found.mode):
            assert len(read(image, LAYERS, nid, 0, 1 << 16)) == min(found.size, 1 << 16)
            assert sum(p.length for p in image.map(nid, 0, found.size)) == found.size


def poke_everything(image: Image, start: int) -> None:
    """Ask every question of every inode number; only FormatError may come out."""
    numbers = range((len(image.buffer) - image.meta_start) // SLOT_SIZE + 2)
    for nid in numbers:
        for question in (
            lambda: image.inode(nid),  # noqa: B023
            lambda: image.lookup(nid, b"dir"),  # noqa: B023
            lambda: list(image.readdir(nid, start)),  # noqa: B023
            lambda: image.readlink(nid),  # noqa: B023
            lambda: image.xattrs(nid),  # noqa: B023
            lambda: image.map(nid, start, 1 << 20),  # noqa: B023
        ):
            try:
                question()
            except FormatError:
                continue


BYTES = st.tuples(st.integers(0, 1 << 16), st.sampled_from([0, 1, 2, 5, 9, 31, 46, 47, 127, 255]))


@settings(max_examples=300)
@given(st.lists(BYTES, min_size=1, max_size=4), st.integers(0, 1 << 14))
def test_damaged_images_raise_nothing_but_format_errors(
    damage: list[tuple[int, int]], start: int
) -> None:
    data = bytearray(IMAGE)
    size = len(data) - 1536
    for offset, value in damage:
        data[1536 + offset % size] = value
    image = Image(data)
    poke_everything(image, start)
    try:
        validate(image, SIZES)
    except FormatError:
        return
    walk_everything(image)


@settings(max_examples=100)
@given(trees(), st.lists(BYTES, min_size=1, max_size=2))
def test_whatever_is_valid_can_be_walked(root: Node, damage: list[tuple[int, int]]) -> None:
    data = bytearray(write(root, DEVICES))
    for offset, value in damage:
        position = offset % len(data)
        data[position] = value
    try:
        image = Image(data)
        validate(image, DEVICES)
    except FormatError:
        return
    walk_everything(image)


WORDS = st.integers(0, 20) | st.integers(0, 0xFFFF)


@settings(max_examples=100)
@given(root=WORDS, meta_block=WORDS, xattr_block=WORDS, inode_count=WORDS)
def test_a_superblock_that_lies_is_found(**fields: int) -> None:
    data = bytearray(IMAGE)
    superblock(**fields)(data, Image(IMAGE))
    try:
        image = Image(data)
    except FormatError:
        return
    poke_everything(image, 0)
    try:
        validate(image, SIZES)
    except FormatError:
        return
    walk_everything(image)


def test_inode_records_are_where_these_tests_think() -> None:
    image = Image(IMAGE)
    position = image.meta_start + nid_of(image, b"/file") * SLOT_SIZE
    assert INODE.unpack_from(IMAGE, position)[3] == 9000
