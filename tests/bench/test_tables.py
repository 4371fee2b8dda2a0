"""Tables as people and scripts see them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from snapshotter.bench import tables
from snapshotter.bench.conditions import Conditions
from snapshotter.bench.tables import Table

if TYPE_CHECKING:
    from pathlib import Path

TABLE = Table(
    "Speed",
    ("work", "MB/s", "files"),
    (("reading", 1234.5678, 28_000), ("writing", 0.0123456, 7)),
    "A note.",
)


def test_text_is_aligned_with_three_digits() -> None:
    assert tables.as_text([TABLE]).splitlines() == [
        "Speed",
        "  work       MB/s   files",
        "  reading   1 235  28 000",
        "  writing  0.0123       7",
        "",
        "A note.",
    ]


def test_markdown_has_a_heading_and_a_table() -> None:
    assert tables.as_markdown([TABLE, TABLE]).splitlines()[:6] == [
        "### Speed",
        "",
        "| work | MB/s | files |",
        "| --- | ---: | ---: |",
        "| reading | 1 235 | 28 000 |",
        "| writing | 0.0123 | 7 |",
    ]


def test_json_has_the_numbers_as_they_were_measured() -> None:
    assert json.loads(tables.as_json([TABLE])) == {
        "Speed": [
            {"work": "reading", "MB/s": 1234.5678, "files": 28_000},
            {"work": "writing", "MB/s": 0.0123456, "files": 7},
        ]
    }


def test_conditions_name_the_machine_and_the_software(tmp_path: Path) -> None:
    shown = {row[0]: row[1] for row in Conditions(tmp_path).table().rows}
    assert {"date", "processor", "kernel", "Python", "libraries", "load average (1 minute)"} <= set(
        shown
    )
    assert all(shown.values())
