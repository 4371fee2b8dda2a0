"""The order in which the suite runs."""

from __future__ import annotations

from pathlib import Path

from tests.conftest import LONGEST

TESTS = Path(__file__).parents[1]


def test_the_files_that_it_begins_with_are_there() -> None:
    assert [name for name in LONGEST if not (TESTS / name).is_file()] == []
