"""Starts of an image in one layer and in many, through real containerd."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest

from snapshotter.bench.layers import Refused, Start, starts_table
from tests.bench.test_command import bench

RATIOS = slice(5, 8)


def test_ratios_are_of_medians_to_one_layer() -> None:
    measured: dict[tuple[str, int], list[Start | Refused]] = {
        ("FirstByte", 1): [Start(2.0, 1.0, ()), Start(9.0, 9.0, ()), Start(1.0, 1.0, ())],
        ("FirstByte", 127): [Start(4.0, 0.5, ())] * 3,
        ("overlayfs", 1): [Start(1.0, 1.0, ())] * 3,
        ("overlayfs", 127): [Start(3.0, 2.0, ())] * 3,
    }
    table = starts_table(measured, "files", 3)
    assert [row[RATIOS] for row in table.rows] == [
        (1.0, 1.0, 1.0),
        (2.0, 0.5, 1.5),
        (1.0, 1.0, 1.0),
        (3.0, 2.0, 2.5),
    ]


def test_what_overlayfs_refuses_is_said_with_its_reason() -> None:
    measured: dict[tuple[str, int], list[Start | Refused]] = {
        ("overlayfs", 1): [Start(1.0, 1.0, ())],
        ("overlayfs", 600): [Refused("invalid argument")],
    }
    table = starts_table(measured, "files", 1)
    assert table.rows[1] == ("overlayfs", 600, *["refused"] * 6)
    assert table.note.endswith("overlayfs with 600 layers: invalid argument")


@pytest.mark.root
def test_every_layer_is_asked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory(prefix="fb-", dir="/var/tmp") as directory:
        monkeypatch.setenv("TMPDIR", directory)
        done = bench("layers", "--layers", "5", "--samples", "1", "--json")
        assert done.returncode == 0, done.stderr
        assert list(Path(directory).iterdir()) == []
    _, starts, calls = json.loads(done.stdout).values()
    assert [(row["snapshotter"], row["layers"]) for row in starts] == [
        ("FirstByte", 1),
        ("FirstByte", 5),
        ("overlayfs", 1),
        ("overlayfs", 5),
    ]
    assert min(row["pull s"] for row in starts) > 0
    prepared = {row["layers"]: row["calls a start"] for row in calls if row["call"] == "Prepare"}
    assert prepared == {1: 1 + 1, 5: 5 + 1}, "each layer, and what the container writes"


@pytest.mark.root
def test_more_layers_than_files_are_refused_in_one_line() -> None:
    done = bench("layers", "--layers", "1000000")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("firstbyte: there are only")
