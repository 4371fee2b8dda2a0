"""`firstbyte bench` as it is typed."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


def bench(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "snapshotter.cli.main", "bench", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)


def test_a_corpus_without_large_files_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "small").write_bytes(b"small")
    done = bench("read", "--corpus", tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("firstbyte: the files to measure with")
