"""Several starts at once, and what else is measured beside single cold starts."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from snapshotter.bench.coldstart.concurrent import Storm, storms_table
from tests.bench.test_command import bench

if TYPE_CHECKING:
    from pathlib import Path

LINK = "200mbit-5ms"


def test_bytes_are_compared_with_those_of_the_fewest_starts() -> None:
    table = storms_table(
        {
            ("firstbyte", 1): [Storm([1.0], 100, 5, 40)] * 3,
            ("firstbyte", 3): [Storm([1.0, 3.0, 2.0], 104, 6, 41)] * 3,
            ("overlayfs", 1): [Storm([9.0], 100, 2, 0)] * 3,
        },
        "redis",
        LINK,
    )
    column = table.columns.index("bytes / fewest starts")
    assert [row[column] for row in table.rows] == [1.0, 1.04, 1.0]
    row = dict(zip(table.columns, table.rows[1], strict=True))
    assert (row["first ready s"], row["median ready s"], row["last ready s"]) == (1.0, 2.0, 3.0)


@pytest.mark.root
def test_starts_at_once_fetch_what_one_does(
    catalogue: Path, workplace: Path, tmp_path: Path
) -> None:
    command = ["concurrent", "--images", catalogue, "--image", "tiny", "--link", LINK, "--json"]
    command += ["--samples", "1", "--starts", "1", "--starts", "3", "--mode", "firstbyte"]
    done = bench(*command, "--cache", tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    title = f"Starts of one image at once: tiny, {LINK}"
    found = json.loads(done.stdout)
    one, three = found[title]
    assert [len(storm["ready"]) for storm in found[f"{title}: samples"]] == [1, 3]
    assert (one["starts"], three["starts"]) == (1, 3)
    assert 0 < three["first ready s"] <= three["median ready s"] <= three["last ready s"]
    assert three["bytes / fewest starts"] < 1.5


@pytest.mark.root
def test_fill_is_compared_with_the_link(catalogue: Path, workplace: Path, tmp_path: Path) -> None:
    command = ["fill", "--images", catalogue, "--image", "tiny", "--link", "20mbit-1ms", "--json"]
    done = bench(*command, "--samples", "1", "--mode", "firstbyte", "--cache", tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    title = "Background fill, 20mbit-1ms"
    found = json.loads(done.stdout)
    (row,), (sample,) = found[title], found[f"{title}: samples"]
    assert row["MB"] == sample["bytes"] / 1e6
    assert row["link MB/s"] == 2.5
    assert 0 < row["MB/s"] <= 1.05 * row["link MB/s"]
    assert row["cores MB/s"] > 0
