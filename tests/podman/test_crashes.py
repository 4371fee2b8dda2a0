"""A crash before any step of a change to the image store leaves nothing half there for podman to
read, and the change can be made again."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tests.support.graph_root_crashes import SCENARIOS
from tests.support.versions import REPOSITORY

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_every_step_of(scenario: str, tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "tests.support.graph_root_crashes", tmp_path, scenario],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    assert int(ended.stdout) >= 2
