"""The process that proves an image's tree."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path


def test_it_ends_when_the_daemon_that_wants_it_has_died(tmp_path: Path) -> None:
    """Whatever it is at: here it waits for somebody to write the index."""
    index = tmp_path / "index"
    os.mkfifo(index)
    command = [sys.executable, "-m", "snapshotter.images.proof", index]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as proof:
        with pytest.raises(subprocess.TimeoutExpired):
            proof.wait(2)
        assert proof.stdin
        proof.stdin.close()
        assert proof.wait(30) == 1
