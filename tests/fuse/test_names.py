"""Names that are kept are those of the image, whatever is asked in which order."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from index.erofs.reader import Image
from index.erofs.writer import write
from snapshotter.fuse import names
from snapshotter.fuse.names import Names
from snapshotter.fuse.view import NID_MASK, pack_inode
from tests.support.serving import directory, regular

if TYPE_CHECKING:
    from index.tree import Node

SMALL = {b"file-%02d" % number: regular(0) for number in range(20)}
LARGE = {b"a-rather-long-name-of-a-file-%05d" % number: regular(0) for number in range(2000)}
TREE: dict[bytes, Node] = {
    **{b"small-%d" % number: directory(dict(SMALL)) for number in range(3)},
    b"large": directory(LARGE),
    b"empty": directory({}),
    b"file": regular(0),
}
IMAGE = Image(write(directory(TREE), []))
DIRECTORIES = [IMAGE.root] + [
    nid for name in TREE if name != b"file" and (nid := IMAGE.lookup(IMAGE.root, name)) is not None
]
SOME_NAMES = [*TREE, *list(SMALL)[:3], *list(LARGE)[:3], b".", b"..", b"none", b"file-"]


@pytest.mark.parametrize("most", [600, 2000, names._MOST])
@given(asked=st.lists(st.tuples(st.sampled_from(DIRECTORIES), st.sampled_from(SOME_NAMES))))
def test_every_answer_is_the_images(most: int, asked: list[tuple[int, bytes]]) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(names, "_MOST", most)
        kept = Names()
        for slot in (1, 2):
            for nid, name in asked:
                found = kept.lookup(IMAGE, pack_inode(slot, nid), name)
                assert found == IMAGE.lookup(nid, name)
                assert kept._size <= most
                assert kept._size == sum(one.size for one in kept._directories.values())


def test_a_directory_is_read_once_while_it_is_walked(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    readdir = IMAGE.readdir
    monkeypatch.setattr(IMAGE, "readdir", lambda nid: read.append(nid) or readdir(nid))
    kept = Names()
    for nid in DIRECTORIES * 2:
        for name in SMALL:
            kept.lookup(IMAGE, pack_inode(1, nid), name)
    large = IMAGE.lookup(IMAGE.root, b"large")
    assert sorted(read) == sorted(nid & NID_MASK for nid in DIRECTORIES if nid != large)
