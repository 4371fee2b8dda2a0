"""Merged layers equal what `umoci unpack` makes of them, and a second, simpler model."""

from __future__ import annotations

import stat
import subprocess
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from index.errors import TarError
from index.tree import walk
from tests.support.awkward import TIMELESS, awkward_layers
from tests.support.layouts import write_layout
from tests.support.merged import apply, content, items, merge
from tests.support.tars import (
    Member,
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
    from collections.abc import Sequence
    from pathlib import Path


def unpack(path: Path, layers: Sequence[bytes]) -> Path:
    """Let umoci unpack `layers`; returns the root directory."""
    write_layout(path / "image", layers)
    command = ["umoci", "unpack", "--image", str(path / "image"), str(path / "bundle")]
    subprocess.run(command, check=True, capture_output=True)
    return path / "bundle" / "rootfs"


# --- the reference ----------------------------------------------------------------------------


@pytest.mark.root
def test_awkward_layers_merge_to_what_umoci_unpacks(tmp_path: Path) -> None:
    layers = awkward_layers()
    expected = read_tree(unpack(tmp_path, layers), timeless=TIMELESS)
    assert differences(items(merge(layers), layers), expected) == []
    assert expected.keys() >= {b"/usr/share", b"/links/deleted-other", b"/sparse/unaligned"}


_NAMES = st.sampled_from([b"a", b"b", b"c"])
_PATHS = st.lists(_NAMES, min_size=1, max_size=3).map(b"/".join)
_MEMBERS = st.one_of(
    st.builds(file, _PATHS, st.sampled_from([b"", b"1", b"22"]), uid=st.integers(0, 3)),
    st.builds(directory, _PATHS, mode=st.sampled_from([0o700, 0o755])),
    st.builds(symlink, _PATHS, st.one_of(_PATHS, _PATHS.map(lambda path: b"/" + path))),
    st.builds(hardlink, _PATHS, _PATHS),
    st.builds(whiteout, _PATHS),
    st.builds(opaque, _PATHS),
)
_LAYERS = st.lists(st.lists(_MEMBERS, max_size=6), min_size=1, max_size=3)


def _can_apply(layers: Sequence[Sequence[Member]], member: Member) -> bool:
    try:
        apply(*layers[:-1], [*layers[-1], member])
    except TarError:
        return False
    return True


@pytest.mark.root
@settings(max_examples=60)
@given(_LAYERS)
def test_random_layers_merge_to_what_umoci_unpacks(
    tmp_path_factory: pytest.TempPathFactory, drawn: list[list[Member]]
) -> None:
    layers: list[list[Member]] = []
    refused: Member | None = None
    for members in drawn:
        layers.append([])
        for member in members:
            if _can_apply(layers, member):
                layers[-1].append(member)
            else:
                refused = member
    path = tmp_path_factory.mktemp("random")
    raw = [tar(*members) for members in layers]
    mine = items(merge(raw), raw)
    timeless = frozenset(path for path, item in mine.items() if stat.S_ISDIR(item.mode))
    expected = read_tree(unpack(path, raw), timeless=timeless)
    assert differences(mine, expected) == []
    if refused and not _can_apply(layers, refused):
        # What the merger refuses in this place, umoci refuses as well.
        raw[-1] = tar(*layers[-1], refused)
        with pytest.raises(subprocess.CalledProcessError):
            unpack(path / "refused", raw)


# --- a model ----------------------------------------------------------------------------------

_PLAIN_MEMBERS = st.one_of(
    st.builds(file, _PATHS, st.sampled_from([b"", b"1", b"22"])),
    st.builds(directory, _PATHS, mode=st.sampled_from([0o700, 0o755])),
    st.builds(whiteout, _PATHS),
    st.builds(opaque, _PATHS),
)


def _model(layers: Sequence[Sequence[Member]]) -> dict[bytes, tuple[str, object]]:
    """The rules once more, on a flat dictionary of paths: slow, and free of trees and caches."""
    tree: dict[bytes, tuple[str, object]] = {}
    for members in layers:
        written: set[bytes] = set()
        for member in members:
            parent, _, name = member.name.rpartition(b"/")
            if name == b".wh..wh..opq":
                hidden = parent + b"/"
                tree = {p: v for p, v in tree.items() if p in written or not p.startswith(hidden)}
            elif name.startswith(b".wh."):
                path = (parent + b"/" if parent else b"") + name[4:]
                tree = {
                    p: v
                    for p, v in tree.items()
                    if p in written or not (p + b"/").startswith(path + b"/")
                }
            else:
                ancestors = [
                    member.name[:end] for end in range(len(member.name)) if member.name[end] == 47
                ]
                if any(tree.get(path, ("directory",))[0] == "file" for path in ancestors):
                    continue
                for path in ancestors:
                    tree.setdefault(path, ("directory", 0o755))
                if member.kind == b"5":
                    tree[member.name] = ("directory", member.mode)
                else:
                    below = member.name + b"/"
                    tree = {p: v for p, v in tree.items() if not p.startswith(below)}
                    tree[member.name] = ("file", member.data)
                written.update([member.name, *ancestors])
    return tree


@given(st.lists(st.lists(_PLAIN_MEMBERS, max_size=8), min_size=1, max_size=4))
def test_files_directories_and_whiteouts_follow_the_model(drawn: list[list[Member]]) -> None:
    layers: list[list[Member]] = []
    for members in drawn:
        layers.append([])
        for member in members:
            if _can_apply(layers, member):
                layers[-1].append(member)
    raw = [tar(*members) for members in layers]
    merged = {
        path[1:]: ("directory", node.mode & 0o7777) if node.is_dir else ("file", content(node, raw))
        for path, node in walk(merge(raw))
        if path != b"/"
    }
    assert merged == _model(drawn)


@given(_LAYERS)
def test_link_counts_are_those_of_the_tree(drawn: list[list[Member]]) -> None:
    layers: list[list[Member]] = [[]]
    for members in drawn:
        layers.append([m for m in members if _can_apply([*layers, []], m)])
        if not _can_apply(layers, directory(b"last")):
            layers.pop()
    nodes = apply(*layers)
    for path, node in nodes.items():
        if node.is_dir:
            inside = [c for c in node.children.values() if c.is_dir]
            assert node.nlink == 2 + len(inside), path
        else:
            assert node.nlink == sum(other is node for other in nodes.values()), path
