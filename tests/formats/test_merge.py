"""Layers are merged as an ordinary sequential unpack into one directory does it."""

from __future__ import annotations

import contextlib
import stat

import pytest
from hypothesis import given
from hypothesis import strategies as st

from index.entry import Entry, EntryType, Segment
from index.errors import TarError, UnsupportedError
from index.merge import Merger
from index.names import components
from index.tree import Extent, walk
from tests.support.merged import apply, content, merge
from tests.support.tars import (
    Member,
    device,
    directory,
    fifo,
    file,
    hardlink,
    opaque,
    symlink,
    tar,
    whiteout,
)

# --- whiteouts --------------------------------------------------------------------------------


def test_a_whiteout_removes_a_lower_directory_with_all_in_it() -> None:
    assert list(apply([file(b"d/e/f")], [whiteout(b"d")])) == [b"/"]


@pytest.mark.parametrize("hide", [whiteout(b"d"), opaque(b"d")], ids=["whiteout", "opaque"])
@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
def test_whiteouts_spare_what_their_own_layer_wrote(hide: Member, first: bool) -> None:
    upper = [file(b"d/new", b"new")]
    upper.insert(0 if first else 1, hide)
    tree = apply([directory(b"d"), file(b"d/old"), file(b"d/e/old")], upper)
    assert list(tree) == [b"/", b"/d", b"/d/new"]


def test_a_whiteout_goes_by_name_not_by_inode() -> None:
    tree = apply([file(b"lower")], [hardlink(b"kept", b"lower"), whiteout(b"lower")])
    assert list(tree) == [b"/", b"/kept"]
    assert tree[b"/kept"].nlink == 1


def test_whiteouts_apply_through_symbolic_links_and_to_them() -> None:
    base = [directory(b"d"), file(b"d/f"), symlink(b"l", b"d")]
    assert list(apply(base, [whiteout(b"l/f")])) == [b"/", b"/d", b"/l"]
    assert list(apply(base, [whiteout(b"l")])) == [b"/", b"/d", b"/d/f"]


def test_a_whiteout_of_nothing_and_aufs_files_change_nothing() -> None:
    harmless = [whiteout(b"x"), whiteout(b"f/x"), opaque(b"y"), file(b".wh..wh.plnk/../.wh..wh.x")]
    assert list(apply([file(b"f")], harmless)) == [b"/", b"/f"]


def test_an_opaque_root_hides_all_lower_layers() -> None:
    assert list(apply([file(b"a/b")], [opaque(b"."), file(b"c")])) == [b"/", b"/c"]


def test_the_whiteout_of_a_255_byte_name_works_although_its_own_is_longer() -> None:
    assert list(apply([file(b"n" * 255)], [whiteout(b"n" * 255)])) == [b"/"]


@pytest.mark.parametrize("name", [b".wh.", b"d/.wh..", b"d/.wh..."])
def test_whiteouts_of_no_name_are_refused(name: bytes) -> None:
    with pytest.raises(TarError, match="whiteout"):
        apply([directory(b"d"), file(name)])


# --- replacing --------------------------------------------------------------------------------


def test_a_directory_over_a_directory_replaces_metadata_and_keeps_children() -> None:
    old = directory(b"d", mode=0o700, uid=1, xattrs={b"user.old": b"1"})
    new = directory(b"d", mode=0o1755, gid=2, mtime_ns=3, xattrs={b"user.new": b"2"})
    node = apply([old, file(b"d/f")], [new])[b"/d"]
    assert (node.mode & 0o7777, node.uid, node.gid, node.mtime_ns) == (0o1755, 0, 2, 3)
    assert node.xattrs == {b"user.new": b"2"}
    assert list(node.children) == [b"f"]


@pytest.mark.parametrize("new", [file(b"x"), symlink(b"x", b"/"), fifo(b"x")])
def test_anything_else_over_a_directory_replaces_the_subtree(new: Member) -> None:
    tree = apply([file(b"x/y/z")], [new])
    assert list(tree) == [b"/", b"/x"]
    assert not tree[b"/x"].is_dir


def test_a_directory_does_not_follow_the_symbolic_link_that_it_replaces() -> None:
    tree = apply([directory(b"t"), symlink(b"l", b"t")], [directory(b"l"), file(b"l/f")])
    assert list(tree) == [b"/", b"/l", b"/l/f", b"/t"]


def test_the_last_of_duplicates_wins_and_earlier_links_keep_the_old_inode() -> None:
    layer = tar(file(b"f", b"old"), hardlink(b"g", b"f"), file(b"f", b"newer"))
    root = merge([layer])
    assert content(root.children[b"f"], [layer]) == b"newer"
    assert content(root.children[b"g"], [layer]) == b"old"
    assert root.children[b"g"].nlink == 1


def test_a_parent_replaced_between_two_entries_is_looked_up_again() -> None:
    tree = apply([file(b"a/1"), file(b"a/2"), directory(b"b"), symlink(b"a", b"b"), file(b"a/3")])
    assert list(tree) == [b"/", b"/a", b"/b", b"/b/3"]
    tree = apply([file(b"a/1")], [file(b"a/2"), whiteout(b"a/1"), file(b"a/3")], [whiteout(b"a")])
    assert list(tree) == [b"/"]


# --- hard links -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "target", [file(b"t", b"1"), symlink(b"t", b"x"), fifo(b"t"), device(b"t", b"3", 1, 3)]
)
def test_a_hard_link_is_another_name_of_the_inode_and_leaves_it_as_it_is(target: Member) -> None:
    tree = apply([target], [hardlink(b"l", b"./t", uid=9, mode=0o777, mtime_ns=1)])
    assert tree[b"/l"] is tree[b"/t"]
    assert (tree[b"/l"].nlink, tree[b"/l"].uid, tree[b"/l"].mtime_ns) == (2, 0, target.mtime_ns)


def test_hard_links_to_lower_files_survive_replacement_and_deletion_of_those() -> None:
    upper = [hardlink(b"x", b"a"), hardlink(b"y", b"b"), file(b"a", b"new"), whiteout(b"b")]
    tree = apply([file(b"a", uid=5), file(b"b", uid=6)], upper)
    assert list(tree) == [b"/", b"/a", b"/x", b"/y"]
    assert [tree[path].uid for path in (b"/a", b"/x", b"/y")] == [0, 5, 6]


def test_the_target_of_a_hard_link_is_contained_in_the_root() -> None:
    tree = apply([file(b"etc/f"), symlink(b"l", b"/../etc"), hardlink(b"x", b"../../l/f")])
    assert tree[b"/x"] is tree[b"/etc/f"]


@pytest.mark.parametrize(
    ("target", "problem"),
    [
        (b"missing", "does not exist"),
        (b"no/parent", "does not exist"),
        (b"link", "does not exist"),
        (b"f/below", "does not exist"),
        (b"d", "is a directory"),
        (b"", "is a directory"),
    ],
)
def test_hard_links_that_no_file_system_takes_name_both_ends(target: bytes, problem: str) -> None:
    with pytest.raises(TarError, match=problem) as caught:
        apply([directory(b"d"), file(b"f"), hardlink(b"link", target)])
    assert "'link'" in str(caught.value)
    assert repr(target)[1:] in str(caught.value)


def test_a_link_to_what_it_replaces_finds_nothing() -> None:
    with pytest.raises(TarError, match="does not exist"):
        apply([file(b"d/f")], [hardlink(b"d", b"d/f")])


# --- names ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "path"),
    [
        (b"/a", b"/a"),
        (b"./a", b"/a"),
        (b"../../a", b"/a"),
        (b"a//b/./c", b"/a/b/c"),
        (b"a/../../b", b"/b"),
        (b"up/a", b"/a"),
        (b"absolute/a", b"/t/a"),
        (b"relative/a", b"/t/a"),
        (b"chain/a", b"/t/a"),
        (b"dangling/a", b"/x/y/a"),
        (b"absolute/../a", b"/a"),
        (b"\xff\xfe/\x01", b"/\xff\xfe/\x01"),
    ],
)
def test_every_name_ends_up_inside_the_root(name: bytes, path: bytes) -> None:
    base = [
        directory(b"t"),
        symlink(b"up", b"../../.."),
        symlink(b"absolute", b"/t"),
        symlink(b"relative", b"./t/../t/"),
        symlink(b"chain", b"absolute"),
        symlink(b"dangling", b"/x/y"),
    ]
    tree = apply(base, [file(name, b"here")])
    assert tree[path].size == 4


@given(st.lists(st.sampled_from([b"a", b"..", b".", b"", b"b"]), max_size=8).map(b"/".join))
def test_cleaned_names_hold_only_proper_components(name: bytes) -> None:
    assert not {b"", b".", b".."} & set(components(name))


def test_the_last_component_is_never_followed() -> None:
    tree = apply([file(b"t", b"untouched"), symlink(b"l", b"t")], [file(b"l", b"new")])
    assert (tree[b"/t"].size, tree[b"/l"].size) == (9, 3)


def test_missing_parents_are_plain_directories_of_root_from_1970() -> None:
    node = apply([file(b"a/b/c", uid=4)])[b"/a/b"]
    assert (node.mode, node.uid, node.gid, node.mtime_ns) == (stat.S_IFDIR | 0o755, 0, 0, 0)


def test_the_root_is_as_its_entry_says_and_else_0755_of_root() -> None:
    assert apply([])[b"/"].mode == stat.S_IFDIR | 0o755
    for name in (b"./", b"/", b"", b"a/.."):
        root = apply([directory(name, mode=0o711, uid=3, mtime_ns=7)])[b"/"]
        assert (root.mode, root.uid, root.mtime_ns) == (stat.S_IFDIR | 0o711, 3, 7)


def test_adding_and_removing_names_leaves_the_mtime_of_directories() -> None:
    tree = apply([directory(b"d", mtime_ns=5), file(b"d/a")], [whiteout(b"d/a"), file(b"d/b")])
    assert tree[b"/d"].mtime_ns == 5


@pytest.mark.parametrize(
    ("members", "problem"),
    [
        ([file(b"./")], "root"),
        ([symlink(b"", b"x")], "root"),
        ([file(b"f"), file(b"f/below")], "'f' is not a directory"),
        ([file(b"n" * 256)], "256 bytes"),
        ([file(b"n" * 256 + b"/f")], "256 bytes"),
        ([symlink(b"l", b"n" * 256), file(b"l/f")], "256 bytes"),
        ([symlink(b"a", b"b"), symlink(b"b", b"a"), file(b"a/f")], "symbolic links"),
        ([symlink(b"l", b"")], "target"),
        ([symlink(b"l", b"t" * 4096)], "target"),
        ([device(b"d", b"3", 4096, 0)], "device number"),
    ],
)
def test_what_no_unpack_can_make_is_refused(members: list[Member], problem: str) -> None:
    with pytest.raises(TarError, match=problem) as caught:
        apply(members)
    assert "layer 0" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_name_with_nul_is_refused() -> None:
    with pytest.raises(TarError, match="NUL"):
        Merger().apply(0, [Entry(b"a\0b", EntryType.REGULAR)])


def test_255_symbolic_links_in_one_path_are_the_limit() -> None:
    links = [symlink(b"l%d" % n, b"l%d" % (n + 1)) for n in range(255)]
    assert b"/l255/f" in apply([*links, directory(b"l255"), file(b"l0/f")])
    with pytest.raises(TarError, match="255 symbolic links"):
        apply([*links, symlink(b"l255", b"end"), directory(b"end"), file(b"l0/f")])


def test_trees_of_any_depth_are_merged_and_removed() -> None:
    deep = b"d/" * 20_000
    tree = apply([file(deep + b"f")], [file(deep + b"g"), opaque(b"d")])
    assert len(tree) == 20_002
    assert list(apply([file(deep + b"f")], [whiteout(b"d")])) == [b"/"]


# --- metadata and data ------------------------------------------------------------------------

_XATTRS = {
    b"user.u": b"\0",
    b"trusted.t": b"",
    b"trusted.overlay.redirect": b"/etc",
    b"security.capability": b"c",
    b"system.posix_acl_access": b"a",
    b"system.posix_acl_default": b"d",
    b"system.nfs4_acl": b"n",
    b"user.": b"no name",
    b"unknown.x": b"x",
}


@pytest.mark.parametrize(
    ("member", "kept"),
    [
        (
            file(b"x", xattrs=_XATTRS),
            "user.u trusted.t security.capability system.posix_acl_access",
        ),
        (
            directory(b"x", xattrs=_XATTRS),
            "user.u trusted.t security.capability system.posix_acl_access system.posix_acl_default",
        ),
        (symlink(b"x", b"y", xattrs=_XATTRS), "trusted.t security.capability"),
        (fifo(b"x", xattrs=_XATTRS), "trusted.t security.capability system.posix_acl_access"),
    ],
)
def test_xattrs_are_kept_where_linux_allows_them(member: Member, kept: str) -> None:
    expected = {name.encode(): _XATTRS[name.encode()] for name in kept.split()}
    assert apply([member])[b"/x"].xattrs == expected


def test_an_xattr_that_cannot_be_stored_is_an_error() -> None:
    with pytest.raises(UnsupportedError, match="65536 bytes"):
        apply([file(b"x", xattrs={b"user.u": bytes(65_536)})])
    with pytest.raises(TarError, match="extended attribute"):
        apply([file(b"x", xattrs={b"user." + b"u" * 251: b""})])


def test_a_symbolic_link_has_mode_0777_and_the_size_of_its_target() -> None:
    node = apply([Member(b"l", b"2", mode=0o600, linkname=b"target")])[b"/l"]
    assert (node.mode, node.size, node.target) == (stat.S_IFLNK | 0o777, 6, b"target")


def test_adjacent_segments_become_one_extent_of_their_layer() -> None:
    segments = (Segment(0, 1024, 512), Segment(512, 1536, 512), Segment(2048, 2048, 100))
    merger = Merger()
    merger.apply(3, [Entry(b"f", EntryType.REGULAR, size=2148, segments=segments)])
    expected = (Extent(0, 3, 1024, 1024), Extent(2048, 3, 2048, 100))
    assert merger.finish().children[b"f"].extents == expected


def test_loose_data_becomes_whole_blocks_up_to_the_end_of_the_file() -> None:
    embedded = ((10, b"a" * 10), (500, b"b" * 20), (5000, b"c" * 50))
    merger = Merger()
    merger.apply(0, [Entry(b"f", EntryType.REGULAR, size=5050, embedded=embedded)])
    first, last = merger.finish().children[b"f"].embedded
    assert first == (0, (bytes(10) + b"a" * 10 + bytes(480) + b"b" * 20).ljust(1024, b"\0"))
    assert last == (4608, bytes(392) + b"c" * 50)


def test_what_has_to_be_in_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("index.merge.MAX_NODES", 4)
    monkeypatch.setattr("index.merge.MAX_INLINE", 10)
    apply([file(b"a/b/c", xattrs={b"user.u": b"0123456789"})])
    with pytest.raises(UnsupportedError, match="more than 4 files"):
        apply([file(b"a/b/c")], [file(b"a/b/c")])
    with pytest.raises(UnsupportedError, match="more than 10 bytes"):
        apply([file(b"a", xattrs={b"user.u": b"01234567890"})])


def test_layers_come_in_ascending_order_and_in_any_number_of_pieces() -> None:
    merger = Merger()
    merger.begin_layer(0)
    merger.apply(0, [Entry(b"a", EntryType.REGULAR)])
    merger.apply(0, [Entry(b".wh.a", EntryType.REGULAR)])
    merger.begin_layer(2)
    with pytest.raises(ValueError, match="layer 1 after layer 2"):
        merger.begin_layer(1)
    assert list(merger.finish().children) == [b"a"]


_PATHS = st.lists(st.sampled_from([b"a", b"b", b"c"]), min_size=1, max_size=3).map(b"/".join)
_ANY_ENTRY = st.builds(
    Entry,
    st.one_of(_PATHS, st.binary(max_size=12)),
    st.sampled_from(EntryType),
    linkname=st.one_of(_PATHS, st.binary(max_size=12)),
    major=st.integers(-1, 5000),
    xattrs=st.dictionaries(st.binary(max_size=9), st.binary(max_size=3), max_size=2),
)


@given(st.lists(st.lists(_ANY_ENTRY, max_size=8), max_size=3))
def test_any_entries_give_a_tree_inside_its_root_or_a_named_error(
    layers: list[list[Entry]],
) -> None:
    merger = Merger()
    with contextlib.suppress(TarError, UnsupportedError):
        for number, entries in enumerate(layers):
            merger.apply(number, entries)
    for path, _ in walk(merger.finish()):
        assert b".." not in path.split(b"/")
