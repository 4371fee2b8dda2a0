"""The kernel's overlayfs over the trees of single layers shows the merged tree."""

from __future__ import annotations

import stat
import subprocess
from collections import Counter, defaultdict
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from index.erofs.reader import Image
from index.erofs.validate import validate
from index.erofs.writer import write
from index.errors import TarError
from index.layertree import USER_OPAQUE, layer_trees
from index.merge import Merger
from index.tree import Node, walk
from tests.support.awkward import awkward_layers, layers_beyond_umoci
from tests.support.kernel_erofs import mounted
from tests.support.merged import content, items, merge, scan
from tests.support.tars import (
    Member,
    device,
    directory,
    file,
    hardlink,
    opaque,
    symlink,
    tar,
    whiteout,
)
from tests.support.trees import differences, read_tree

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from tests.support.trees import Item


def trees_of(*layers: Sequence[Member]) -> list[dict[bytes, Node]]:
    """For each layer of these members, every path of its tree with its node."""
    return [dict(walk(root)) for root in layer_trees(scan(tar(*members)) for members in layers)]


def is_whiteout(node: Node) -> bool:
    return stat.S_ISCHR(node.mode) and node.rdev == (0, 0)


def is_opaque(node: Node) -> bool:
    return node.xattrs.get(b"trusted.overlay.opaque") == b"y"


# --- what is in a layer's tree ------------------------------------------------------------------


def test_a_layer_has_what_it_wrote_and_the_directories_on_the_way() -> None:
    lower = [directory(b"d", mode=0o700, uid=5), file(b"d/e/old", b"1"), file(b"other/f")]
    _, upper = trees_of(lower, [file(b"d/e/new", b"2")])
    assert list(upper) == [b"/", b"/d", b"/d/e", b"/d/e/new"]
    assert (upper[b"/d"].mode, upper[b"/d"].uid) == (stat.S_IFDIR | 0o700, 5)
    assert (upper[b"/d"].nlink, upper[b"/d/e"].nlink) == (3, 2)
    assert not any(is_opaque(node) for node in upper.values())


def test_opaque_directories_are_marked_for_who_mounts() -> None:
    layers = [[file(b"d/old", b"1")], [opaque(b"d"), file(b"d/new", b"2")]]
    *_, upper = layer_trees((scan(tar(*members)) for members in layers), USER_OPAQUE)
    assert dict(walk(upper))[b"/d"].xattrs == {b"user.overlay.opaque": b"y"}


def test_an_empty_layer_has_a_root_with_the_metadata_of_the_merged_one() -> None:
    _, upper = trees_of([directory(b".", mode=0o750, uid=3), file(b"f")], [])
    assert list(upper) == [b"/"]
    assert (upper[b"/"].mode, upper[b"/"].uid) == (stat.S_IFDIR | 0o750, 3)


def test_a_directory_that_is_described_anew_comes_without_what_is_in_it() -> None:
    _, upper = trees_of([directory(b"d", mode=0o700), file(b"d/f")], [directory(b"d")])
    assert list(upper) == [b"/", b"/d"]
    assert not is_opaque(upper[b"/d"])


def test_a_name_that_is_gone_is_a_whiteout() -> None:
    lower = [file(b"d/gone"), file(b"d/tree/f"), file(b"d/kept")]
    hidden = [whiteout(b"d/gone"), whiteout(b"d/tree"), whiteout(b"d/never")]
    _, upper = trees_of(lower, hidden)
    assert list(upper) == [b"/", b"/d", b"/d/gone", b"/d/tree"]
    assert [is_whiteout(node) for node in upper.values()] == [False, False, True, True]


def test_a_directory_that_lost_all_of_lower_layers_is_opaque() -> None:
    _, upper = trees_of([file(b"d/a"), file(b"d/b")], [opaque(b"d"), file(b"d/c")])
    assert list(upper) == [b"/", b"/d", b"/d/c"]
    assert is_opaque(upper[b"/d"])


def test_all_that_the_root_lost_are_whiteouts() -> None:
    _, upper = trees_of([file(b"a"), file(b"b/c")], [opaque(b"."), file(b"d")])
    assert [path for path, node in upper.items() if is_whiteout(node)] == [b"/a", b"/b"]
    assert not is_opaque(upper[b"/"])


def test_a_directory_in_the_place_of_another_is_opaque_and_in_that_of_a_file_is_not() -> None:
    _, upper = trees_of(
        [file(b"d/f"), file(b"e"), file(b"x")],
        [whiteout(b"d"), directory(b"d"), directory(b"e")],
    )
    assert is_opaque(upper[b"/d"])
    assert not is_opaque(upper[b"/e"])


def test_a_link_to_a_lower_layers_file_has_its_extents() -> None:
    raw = tar(file(b"lower", b"x" * 1000))
    upper = list(layer_trees([scan(raw), scan(tar(hardlink(b"a", b"lower")))]))[1]
    assert list(upper.children) == [b"a"]
    node = upper.children[b"a"]
    assert (node.nlink, [extent.layer for extent in node.extents]) == (1, [0])
    assert content(node, [raw]) == b"x" * 1000


def test_links_within_a_layer_are_one_inode() -> None:
    lower = [file(b"f", b"data")]
    _, upper = trees_of(lower, [hardlink(b"a", b"f"), hardlink(b"b", b"a"), whiteout(b"f")])
    assert upper[b"/a"] is upper[b"/b"]
    assert upper[b"/a"].nlink == 2
    assert is_whiteout(upper[b"/f"])


def test_trees_stay_as_they_were_yielded() -> None:
    layers = [scan(layer) for layer in awkward_layers()]
    kept = [list(walk(root)) for root in layer_trees(layers)]
    again = [[(path, _facts(n)) for path, n in walk(root)] for root in layer_trees(layers)]
    assert [[(path, _facts(node)) for path, node in tree] for tree in kept] == again


def _facts(node: Node) -> tuple[object, ...]:
    return tuple(getattr(node, name) for name in Node.__slots__ if name != "children")


def test_the_depth_of_a_tree_is_no_matter() -> None:
    path = b"/".join([b"d"] * 2000)
    trees = trees_of([file(path + b"/f")], [file(path + b"/g")])
    assert [len(tree) for tree in trees] == [2002, 2002]


# --- what the kernel makes of them --------------------------------------------------------------


@contextmanager
def stacked(trees: Sequence[Node], layers: Sequence[bytes], path: Path) -> Iterator[Path]:
    """The trees as EROFS images over the layers, under overlayfs."""
    devices = [path / f"raw{number}" for number in range(len(layers))]
    for device_path, layer in zip(devices, layers, strict=True):
        device_path.write_bytes(layer)
    merged, bottom = path / "merged", path / "bottom"
    merged.mkdir()
    bottom.mkdir()  # overlayfs without an upper directory wants two lower ones
    with ExitStack() as stack:
        lower = [bottom]
        for number, root in enumerate(trees):
            sizes = [len(layer) for layer in layers[: number + 1]]
            data = write(root, sizes)
            validate(Image(data), sizes)
            (path / f"image{number}").write_bytes(data)
            target = path / f"{number}"
            target.mkdir()
            used = devices[: number + 1]
            lower.insert(0, stack.enter_context(mounted(path / f"image{number}", used, target)))
        options = "lowerdir=" + ":".join(map(str, lower))
        subprocess.run(["mount", "-t", "overlay", "overlay", "-o", options, merged], check=True)
        stack.callback(lambda: subprocess.run(["umount", merged], check=True))
        yield merged


def expected(layers: Sequence[bytes]) -> dict[bytes, Item]:
    """The merged tree, where names of an inode that different layers made are apart."""
    merger = Merger()
    nodes: dict[bytes, Node] = {}
    maker: dict[bytes, int] = {}
    links: Counter[tuple[Node, int]] = Counter()
    for number, layer in enumerate(layers):
        merger.apply(number, scan(layer))
        before, nodes = nodes, dict(walk(merger.root))
        maker = {p: maker[p] if before.get(p) is n else number for p, n in nodes.items()}
        # Removing a name in a higher layer does not take it from the inode.
        links.update((node, number) for path, node in nodes.items() if maker[path] == number)
    names: defaultdict[tuple[Node, int], list[bytes]] = defaultdict(list)
    inodes = {path.rstrip(b"/"): (node, maker[path]) for path, node in nodes.items()}
    for path, inode in sorted(inodes.items()):
        names[inode].append(path)
    return {
        path: replace(
            item,
            names=tuple(names[inodes[path]]),
            nlink=None if item.nlink is None else links[inodes[path]],
        )
        for path, item in items(merge(layers), layers).items()
    }


def assert_overlayfs_shows_the_merged_tree(layers: Sequence[bytes], path: Path) -> None:
    trees = list(layer_trees(scan(layer) for layer in layers))
    with stacked(trees, layers, path) as merged:
        assert differences(read_tree(merged), expected(layers)) == []


AWKWARD = [*awkward_layers(), *layers_beyond_umoci(), tar(opaque(b"."), file(b"usr/left"))]


@pytest.mark.root
@pytest.mark.parametrize("depth", range(1, len(AWKWARD) + 1))
def test_overlayfs_shows_awkward_layers_as_they_are_merged(tmp_path: Path, depth: int) -> None:
    assert_overlayfs_shows_the_merged_tree(AWKWARD[:depth], tmp_path)


_NAMES = st.sampled_from([b"a", b"b", b"c"])
_PATHS = st.lists(_NAMES, min_size=1, max_size=4).map(b"/".join)
_MEMBERS: st.SearchStrategy[Member] = st.one_of(
    st.builds(file, _PATHS, st.sampled_from([b"", b"1", b"2" * 600]), uid=st.integers(0, 3)),
    st.builds(directory, _PATHS, mode=st.sampled_from([0o700, 0o755])),
    st.builds(symlink, _PATHS, _PATHS),
    st.builds(hardlink, _PATHS, _PATHS),
    st.builds(device, _PATHS, st.just(b"3"), st.just(1), st.integers(0, 3)),
    st.builds(whiteout, _PATHS),
    st.builds(opaque, st.one_of(_PATHS, st.just(b"."))),
)


def _applicable(drawn: Sequence[Sequence[Member]]) -> list[bytes]:
    """The layers of these members, but for those that the merger refuses where they are."""
    layers: list[list[Member]] = []
    for members in drawn:
        layers.append([])
        for member in members:
            layers[-1].append(member)
            try:
                merge([tar(*layer) for layer in layers])
            except TarError:
                layers[-1].pop()
    return [tar(*layer) for layer in layers]


@pytest.mark.root
@settings(max_examples=60)
@given(st.lists(st.lists(_MEMBERS, max_size=8), min_size=1, max_size=5))
def test_overlayfs_shows_random_layers_as_they_are_merged(
    tmp_path_factory: pytest.TempPathFactory, drawn: list[list[Member]]
) -> None:
    assert_overlayfs_shows_the_merged_tree(_applicable(drawn), tmp_path_factory.mktemp("random"))
