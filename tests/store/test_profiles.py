"""Startup profiles on disk: merged over runs, bounded, and nothing that is damaged is used."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from index.errors import FormatError
from index.profile import Profile, Touch
from snapshotter.store import profiles
from snapshotter.store.profiles import ProfileStore

if TYPE_CHECKING:
    from pathlib import Path

CHAIN = "sha256:" + "ab" * 32
OTHER = "sha256:" + "cd" * 32


def run(*chunks: int, layers: int = 1) -> Profile:
    diff_ids = tuple(bytes([number]) * 32 for number in range(layers))
    return Profile(diff_ids, tuple(Touch(0, chunk, 0) for chunk in chunks))


def test_runs_are_merged_also_across_restarts(tmp_path: Path) -> None:
    ProfileStore(tmp_path).add(CHAIN, run(1, 2))
    merged = ProfileStore(tmp_path).add(CHAIN, run(1, 3))
    assert merged.runs == 2
    assert [touch.chunk for touch in merged.touches] == [1, 2, 3]
    assert ProfileStore(tmp_path).get(CHAIN) == merged
    assert ProfileStore(tmp_path).get(OTHER) is None


def test_a_damaged_profile_counts_as_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = ProfileStore(tmp_path)
    store.add(CHAIN, run(1, 2))
    (path,) = (tmp_path / "profiles").iterdir()
    path.write_bytes(path.read_bytes()[:-10])
    assert store.get(CHAIN) is None
    assert "cannot be read" in caplog.text
    assert store.add(CHAIN, run(3)).touches == run(3).touches


def test_one_of_other_layers_is_replaced(tmp_path: Path) -> None:
    store = ProfileStore(tmp_path)
    store.add(CHAIN, run(1))
    assert store.add(CHAIN, run(2, layers=2)).runs == 1


def test_the_oldest_go_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiles, "MAX_PROFILES", 2)
    store = ProfileStore(tmp_path)
    chains = [f"sha256:{number:064x}" for number in range(4)]
    for age, chain in enumerate(chains):
        store.add(chain, run(1))
        os.utime(tmp_path / "profiles" / f"{chain[7:]}.json", (age, age))
    assert store.chain_ids() == [chains[3], chains[2]]


def test_a_profile_can_be_forgotten_once(tmp_path: Path) -> None:
    store = ProfileStore(tmp_path)
    store.add(CHAIN, run(1))
    assert store.remove(CHAIN)
    assert not store.remove(CHAIN)
    assert store.chain_ids() == []


def test_a_name_that_is_no_digest_reaches_no_file(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="is no SHA-256 digest"):
        ProfileStore(tmp_path).get("sha256:../../etc/passwd")


def test_a_reader_makes_no_directory(tmp_path: Path) -> None:
    assert ProfileStore(tmp_path, writer=False).chain_ids() == []
    assert not (tmp_path / "profiles").exists()
