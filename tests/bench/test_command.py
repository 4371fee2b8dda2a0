"""`firstbyte bench` as it is typed."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner

from snapshotter.bench import fio
from snapshotter.cli.main import main

if TYPE_CHECKING:
    from pathlib import Path


def bench(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "snapshotter.cli.main", "bench", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)


@pytest.mark.root
def test_results_come_as_json_with_their_conditions(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fio, "_SECONDS", 0.05)
    command = ["bench", "read", "--json", "--samples", "1", "--corpus", str(tree)]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 0, done.stderr
    first, *others = json.loads(done.stdout)
    assert first == "Conditions"
    assert len(others) - fio.installed() == 4  # one for each mode, and first reads


def test_a_corpus_without_large_files_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "small").write_bytes(b"small")
    done = bench("read", "--corpus", tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("firstbyte: the files to measure with")
