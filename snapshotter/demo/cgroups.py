"""The machine's cgroups, as far as containers of the demo make them."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")
_HIERARCHIES = ("", "*/")  # the unified one, and one for each controller
_END_SECONDS = 5.0
_POLL_SECONDS = 0.01


def remove_cgroups(name: str) -> None:
    """Kill what is in cgroups of this name, and remove them with those below; fine if there are
    none."""
    end = time.monotonic() + _END_SECONDS
    while (found := _below(name)) and time.monotonic() < end:
        for cgroup in found:
            with contextlib.suppress(OSError):  # gone meanwhile, or its last process is ending
                for pid in (cgroup / "cgroup.procs").read_text().split():
                    os.kill(int(pid), signal.SIGKILL)
                cgroup.rmdir()
        if _below(name):
            time.sleep(_POLL_SECONDS)


def _below(name: str) -> list[Path]:
    """The cgroups of this name and all below, lower ones first."""
    tops = [top for place in _HIERARCHIES for top in _CGROUPS.glob(f"{place}{name}")]
    return [Path(path) for top in tops for path, _, _ in os.walk(top, topdown=False)]
