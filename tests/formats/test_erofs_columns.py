"""Checking an image in columns finds what checking it record by record finds, whatever is in it."""

from __future__ import annotations

import random
import stat
import struct
from itertools import chain, product
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from index.erofs import columns, directory, validate
from index.erofs.directory import Names
from index.erofs.layout import (
    BLOCK_SIZE,
    DIRENT,
    FORMAT_CHUNKED,
    HOLE,
    SLOT_SIZE,
    WHOLE_FILE,
    WHOLE_FILE_CHUNKS,
    WHOLE_FILE_MAX,
)
from index.erofs.reader import Image
from index.erofs.writer import write
from index.errors import FormatError
from index.tree import Extent, Node
from tests.support.erofs_oracle import bytes_used, is_valid
from tests.support.erofs_trees import DEVICES, regular, symlink, trees
from tests.support.erofs_trees import directory as folder

if TYPE_CHECKING:
    from collections.abc import Iterator


def like_a_real_image() -> Node:
    """Long runs of whole files, and everything else strewn among them."""
    number = random.Random(1)
    linked = regular(900, Extent(0, 0, 0, 900), nlink=3)

    def whole() -> Node:
        layer = number.choice((0, 2))
        size = number.randint(1, 3000)
        start = number.randrange((DEVICES[layer] - size) // BLOCK_SIZE + 1) * BLOCK_SIZE
        return regular(size, Extent(0, layer, start, size))

    def some(count: int) -> dict[bytes, Node]:
        return {b"%s-%d" % (number.randbytes(4).hex().encode(), n): whole() for n in range(count)}

    strewn = {
        b"empty": regular(),
        b"hard": linked,
        b"link": symlink(b"../" * 5),
        b"long": symlink(b"long" * 200),
        b"own": Node(stat.S_IFREG, size=1000, embedded=((0, b"x" * 1000),)),
        b"null": Node(stat.S_IFCHR, rdev=(1, 3)),
        b"pipe": Node(stat.S_IFIFO),
        b"sparse": regular(4096, Extent(2048, 0, 0, 2048)),
        b"xattr": regular(512, Extent(0, 0, 0, 512), xattrs={b"user.a": b"b"}),
    }
    below = {
        b"large": folder(some(150)),
        b"small": folder(some(5) | {b"hard": linked, b"below": folder({b"hard": linked})}),
        b"strewn": folder(some(40) | strewn),
        b"empty": folder(),
        b"x" * 255: folder({b"y" * 255: whole(), b"z" * 250: whole()}),
    }
    return folder(some(30) | below)


REAL = write(like_a_real_image(), DEVICES)


def test_an_image_like_a_real_one_is_valid() -> None:
    validate.validate(Image(REAL), DEVICES)
    assert is_valid(Image(REAL), DEVICES)


def reachable(image: Image) -> list[int]:
    """The inodes of a valid image."""
    nids, stack = {image.root}, [image.root]
    while stack:
        for _, _, nid, dtype in image.readdir(stack.pop()):
            nids.add(nid)
            if dtype == 2:
                stack.append(nid)
    return sorted(nids)


FIELDS = {
    "format": (0, 2), "xattrs": (2, 2), "mode": (4, 2), "reserved": (6, 2), "size": (8, 8),
    "union": (16, 4), "nanoseconds": (40, 4), "links": (44, 4), "high": (64, 2), "device": (66, 2),
    "block": (68, 4), "anything": (72, 8),
}  # fmt: skip
VALUES = st.one_of(
    st.integers(0, 10),
    st.sampled_from(
        [
            *(0o100644, 0o40755, 0o120777, 0o20644, 0o10644, 0o104755),
            *(WHOLE_FILE_CHUNKS, WHOLE_FILE_CHUNKS - 1, 31, WHOLE_FILE_MAX, WHOLE_FILE_MAX + 1),
            *(999_999_999, 10**9, HOLE, 1 << 63, (1 << 63) - 1, 1 << 62, 17, 79, 80, 512, 40960),
        ]
    ),
    st.integers(0, (1 << 64) - 1),
)
INODES = st.tuples(st.integers(0), st.sampled_from(sorted(FIELDS)), VALUES)
"""Which inode, which field, which value."""
ENTRIES = st.tuples(
    st.integers(0), st.sampled_from(["nid", "swap", "offset", "type", "name"]), st.integers(0)
)
"""Which entry of all directories; what of it; how."""
BYTES = st.tuples(st.integers(0), st.just("byte"), st.integers(0, 255))
DAMAGE = st.lists(INODES | ENTRIES | BYTES, min_size=1, max_size=3)


def entries(image: Image) -> Iterator[tuple[int, int, bytes]]:
    """Where each block is, the number of an entry in it, and the block."""
    data = bytes(image.buffer)
    for nid in reachable(image):
        if stat.S_ISDIR(image.inode(nid).mode):
            for _, block in image.directory_blocks(nid):
                at = data.index(block)
                for number in range(len(directory.unpack(block).names)):
                    yield at, number, block


class Target:
    """A valid image, and where in it is what can be damaged."""

    def __init__(self, data: bytes) -> None:
        image = Image(data)
        self.data = data
        self.start = image.meta_start
        self.nids = reachable(image)
        self.entries = list(entries(image))

    def damaged(self, damage: list[tuple[int, str, int]]) -> bytearray:
        out = bytearray(self.data)
        for which, what, how in damage:
            if what == "byte":
                out[which % len(out)] = how
            elif what in FIELDS:
                offset, size = FIELDS[what]
                at = self.start + self.nids[which % len(self.nids)] * SLOT_SIZE + offset
                if at + size <= len(out):
                    out[at : at + size] = (how % (1 << 8 * size)).to_bytes(size, "little")
            else:
                self._damage_entry(out, self.entries[which % len(self.entries)], what, how)
        return out

    def _damage_entry(
        self, out: bytearray, entry: tuple[int, int, bytes], what: str, how: int
    ) -> None:
        start, number, block = entry
        at = start + number * DIRENT.size
        nid, offset, dtype = DIRENT.unpack_from(out, at)
        if what == "nid":
            nid = self.nids[how % len(self.nids)] if how & 1 else how % (1 << 64)
        elif what == "swap":
            other_start, other, _ = self.entries[how % len(self.entries)]
            nid, _, dtype = DIRENT.unpack_from(out, other_start + other * DIRENT.size)
        elif what == "offset":
            offset = how % 600
        elif what == "type":
            dtype = how % 10 if how & 1 else how % 256
        elif offset + how % 5 < len(block):
            out[start + offset + how % 5] = b"\0/.-az~"[how % 7]
        DIRENT.pack_into(out, at, nid, offset, dtype)


LIKE_REAL = Target(REAL)
AT_ONCE = st.sampled_from([1, 2, 7, 256])
"""How many blocks and files are checked together."""


def agree(data: bytearray, at_once: int) -> bool | None:
    """What the validator and the simple check both say; None if it is no image."""
    try:
        image = Image(data)
    except FormatError:
        return None
    said = True
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(validate, "_BLOCKS", at_once)
        patch.setattr(validate, "_FILES", at_once)
        try:
            validate.validate(image, DEVICES)
        except FormatError:
            said = False
    assert said == is_valid(image, DEVICES)
    return said


@settings(max_examples=300)
@given(DAMAGE, AT_ONCE)
def test_both_checks_agree_about_damaged_real_images(
    damage: list[tuple[int, str, int]], at_once: int
) -> None:
    agree(LIKE_REAL.damaged(damage), at_once)


@settings(max_examples=150)
@given(trees(), st.just([]) | DAMAGE, AT_ONCE)
def test_both_checks_agree_about_damaged_images_of_any_tree(
    root: Node, damage: list[tuple[int, str, int]], at_once: int
) -> None:
    target = Target(write(root, DEVICES))
    said = agree(target.damaged(damage), at_once)
    assert said or damage


def whole_files() -> list[int]:
    start = Image(REAL).meta_start
    found = []
    for nid in LIKE_REAL.nids:
        form, xattrs, _, _, union, *_ = WHOLE_FILE.unpack_from(REAL, start + nid * SLOT_SIZE)
        if (form, xattrs, union) == (FORMAT_CHUNKED, 0, WHOLE_FILE_CHUNKS):
            found.append(nid)
    return found


def of_type(bits: int) -> list[int]:
    image = Image(REAL)
    return [nid for nid in LIKE_REAL.nids if stat.S_IFMT(image.inode(nid).mode) == bits]


COMMON = [("format", 2), ("mode", 0o10644), ("nanoseconds", 10**9), ("links", 1 << 31)]
WHOLE = [
    *COMMON, ("xattrs", 1), ("size", 0), ("size", WHOLE_FILE_MAX + 1), ("union", 0x1F),
    ("links", 0), ("links", 2), ("high", 1), ("device", 4), ("block", HOLE - 1),
]  # fmt: skip
INLINE = [*COMMON, ("size", 0), ("size", 1 << 40), ("union", 0xFFFF)]


@pytest.mark.parametrize("at_once", [1, 2, 7, 256])
@pytest.mark.parametrize(
    ("nids", "broken"),
    [
        (whole_files(), WHOLE),
        (of_type(stat.S_IFLNK), [*INLINE, ("links", 2)]),
        (of_type(stat.S_IFDIR), INLINE),
    ],
    ids=["whole files", "symlinks", "directories"],
)
def test_each_field_of_each_inode_is_looked_at(
    nids: list[int], broken: list[tuple[str, int]], at_once: int
) -> None:
    """Of the first and the last that are checked together, and of those between."""
    pairs = list(product(nids, broken))
    for nid, (field, value) in random.Random(at_once).sample(pairs, min(len(pairs), 200)):
        damage = (LIKE_REAL.nids.index(nid), field, value)
        assert agree(LIKE_REAL.damaged([damage]), at_once) is False


def test_a_file_of_more_than_a_chunk_is_no_whole_file() -> None:
    fields = [
        FORMAT_CHUNKED,
        0,
        0o100644,
        WHOLE_FILE_MAX,
        WHOLE_FILE_CHUNKS,
        0,
        0,
        0,
        0,
        1,
        0,
        1,
        0,
    ]
    for size, whole in ((1, True), (WHOLE_FILE_MAX, True), (WHOLE_FILE_MAX + 1, False)):
        fields[3] = size
        assert columns.are_whole_files(WHOLE_FILE.pack(*fields), [0, 1 << 41]) is whole
    assert not columns.are_whole_files(b"", [0])
    assert not columns.are_whole_files(WHOLE_FILE.pack(*fields)[:-1], [0, 1 << 41])


def test_every_byte_is_counted_once() -> None:
    image = Image(REAL)
    validator = validate._Validator(image, DEVICES)
    validator.run()
    assert len(REAL) - validator._unclaimed == bytes_used(image, DEVICES)


def test_files_of_several_layers_are_held_against_their_own() -> None:
    """Also where all of them would fit into the largest."""
    files = {b"%d" % n: regular(512, Extent(0, n % 2 * 2, 512 * n, 512)) for n in range(8)}
    data = write(folder(files), DEVICES)
    for n, block, valid in ((2, 79, True), (2, 80, False), (3, 16, True), (3, 17, False)):
        image = bytearray(data)
        at = image.index(struct.pack("<HHI", 0, n % 2 * 2 + 1, n))
        image[at + 4 : at + 8] = block.to_bytes(4, "little")
        assert agree(image, 256) is valid


@pytest.mark.parametrize(("number", "other"), [(0, b"-"), (1, b".-")])
def test_a_directory_has_both_dots(number: int, other: bytes) -> None:
    """Even if everything else is in order without one of them."""
    file = regular(nlink=2)
    image = Image(write(folder({b"a": folder({b"b": file}), b"c": file}), DEVICES))
    nid, below = image.lookup(image.root, b"c"), image.lookup(image.root, b"a")
    assert nid is not None
    assert below is not None
    data = bytearray(image.buffer)
    links = image.meta_start + nid * SLOT_SIZE + 44
    data[links : links + 4] = (3).to_bytes(4, "little")
    block = image.meta_start + below * SLOT_SIZE + 64
    _, offset, _ = DIRENT.unpack_from(data, block + number * DIRENT.size)
    DIRENT.pack_into(data, block + number * DIRENT.size, nid, offset, 1)
    data[block + offset : block + offset + len(other)] = other
    assert agree(data, 256) is False
    with pytest.raises(FormatError, match="lacks its entries"):
        validate.validate(Image(data), DEVICES)


@pytest.mark.parametrize("at_once", [1, 5, 256])
def test_a_directory_of_many_blocks_is_one_directory(at_once: int) -> None:
    """Its names are in order from block to block, and its link count is that of all blocks."""
    names = [b"%04d-%s" % (n, b"n" * 90) for n in range(60)]
    tree = folder({name: folder() if n % 7 == 3 else regular() for n, name in enumerate(names)})
    data = write(tree, DEVICES)
    target = Target(data)
    assert agree(bytearray(data), at_once)
    inode = target.nids.index(Image(data).root)
    assert agree(target.damaged([(inode, "links", tree.nlink - 1)]), at_once) is False
    firsts = [number for number, (_, entry, _) in enumerate(target.entries) if entry == 0]
    for number in firsts[1:15]:
        start, _, block = target.entries[number]
        image = bytearray(data)
        at = start + directory.names_start(block)
        image[at : at + 4] = b"0000"
        assert agree(image, at_once) is False


def test_a_name_has_at_most_255_bytes() -> None:
    data = bytearray(write(folder({b"n" * 255: regular()}), DEVICES))
    assert agree(data, 256)
    root = Image(data).root * SLOT_SIZE + Image(data).meta_start
    size = int.from_bytes(data[root + 8 : root + 16], "little")
    data[root + 8 : root + 16] = (size + 1).to_bytes(8, "little")
    data[root + 64 + size] = ord("n")
    assert agree(data, 256) is False
    with pytest.raises(FormatError, match="more than 255"):
        validate.validate(Image(data), DEVICES)


NAMES = st.lists(st.binary(min_size=1, max_size=40), min_size=1, max_size=60, unique=True)
NOISE = st.lists(st.tuples(st.integers(0, 511), st.integers(0, 255)), max_size=2)


def packed(names: list[bytes], noise: list[tuple[int, int]], seed: int) -> list[bytes]:
    """The blocks of a directory, one of them damaged."""
    legal = {name.replace(b"/", b"_").replace(b"\0", b"0") for name in names} - {b".", b".."}
    made = Names(legal)
    number = random.Random(seed)
    nids = [number.getrandbits(number.choice((8, 32, 64))) for _ in made.names]
    data = made.pack(nids, [number.randrange(1, 8) for _ in made.names])
    blocks = [bytearray(data[at : at + BLOCK_SIZE]) for at in range(0, len(data), BLOCK_SIZE)]
    for place, value in noise:
        block = blocks[seed % len(blocks)]
        block[place % len(block)] = value
    return [bytes(block) for block in blocks]


@settings(max_examples=200)
@given(st.lists(st.tuples(NAMES, NOISE, st.integers(0, 1000)), min_size=1, max_size=3))
def test_blocks_are_read_together_as_each_by_itself(
    directories: list[tuple[list[bytes], list[tuple[int, int]], int]],
) -> None:
    blocks = list(chain.from_iterable(packed(*made) for made in directories))
    try:
        each = [directory.unpack(block) for block in blocks]
    except FormatError:
        with pytest.raises(FormatError):
            columns.unpack(blocks)
        return
    together, counts = columns.unpack(blocks)
    assert counts == [len(found.names) for found in each]
    assert together.names == [name for found in each for name in found.names]
    assert together.nids == [nid for found in each for nid in found.nids]
    assert together.dtypes == b"".join(found.dtypes for found in each)
