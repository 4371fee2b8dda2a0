"""Installed packages and what they need."""

from __future__ import annotations

import os

from hypothesis import given
from hypothesis import strategies as st

from snapshotter.demo.packages import Packages, files_of

STATUS = """\
installed\tapp\t\tlibc6 (>= 2.34), libz1:any (= 1.2) | libz-ng, mail-agent
installed\tlibc6\t\t, libgcc
installed\tlibgcc\t\tlibc6
installed\tlibz-ng\tlibz-compat (= 1)\tlibc6
installed\tpostman\tmail-agent, mail-reader\tlibc6
config-files\tremoved\t\tlibc6
"""

names = st.sampled_from([f"p{number}" for number in range(12)])
graphs = st.dictionaries(names, st.lists(st.lists(names, min_size=1, max_size=3), max_size=3))


def test_a_closure_follows_alternatives_virtual_packages_and_cycles() -> None:
    packages = Packages.parse(STATUS)
    assert packages.closure(["app"]) == ["app", "libc6", "libgcc", "libz-ng", "postman"]


def test_what_is_not_installed_is_left_out() -> None:
    packages = Packages.parse(STATUS)
    assert packages.closure(["removed", "unheard-of", "libgcc"]) == ["libc6", "libgcc"]


@given(graphs, st.lists(names), st.sets(names))
def test_closures_are_complete_and_overlap_nothing(
    needs: dict[str, list[list[str]]], roots: list[str], lower: set[str]
) -> None:
    packages = Packages(needs, {})
    below = packages.closure(lower)
    added = packages.closure(roots, without=below)
    together = {*below, *added}
    assert not set(below) & set(added)
    assert {root for root in roots if root in needs} <= together
    for package in together:
        for group in needs[package]:
            installed = [name for name in group if name in needs]
            assert not installed or installed[0] in together


def test_this_machine_has_a_base_system() -> None:
    packages = Packages.installed()
    assert "libc6" in packages.closure(["bash"])
    files = files_of(["base-files", "bash"])
    assert "/bin/bash" in files
    assert "/etc/debian_version" in files
    assert all(os.path.isabs(path) for path in files)
