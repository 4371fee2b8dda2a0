"""A crash before any step of a call leaves nothing half there, and the call can be repeated."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.snapshot_crashes import SCENARIOS


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_every_step_of(scenario: str, tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "tests.support.snapshot_crashes", tmp_path, scenario],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    assert int(ended.stdout) > 5
