"""Running a program without privileges, wherever the project and its Python are."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

NOBODY = 65534

_DROP = f"import os; os.setgroups([]); os.setgid({NOBODY}); os.setuid({NOBODY})"


def as_nobody(
    program: str, *arguments: str | bytes | Path, imports: str = ""
) -> subprocess.CompletedProcess[str]:
    """Run a Python program as nobody. `imports` run before: root's files may be out of reach."""
    return subprocess.run(
        [sys.executable, "-c", f"{imports}\n{_DROP}\n{program}", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
