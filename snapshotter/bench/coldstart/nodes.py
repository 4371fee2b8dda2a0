"""Nodes that start images: what runs on them, and what that has cost.

Other runtimes come in here: whatever has the members of `Node`.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

from snapshotter.bench.errors import BenchError
from snapshotter.demo.ready import Watched
from snapshotter.demo.workspace import mounts_below

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from snapshotter.bench.coldstart.catalogue import Image
    from snapshotter.demo.lazy import Local

_PEAK = re.compile(r"^VmHWM:\s*(\d+) kB$", re.MULTILINE)  # proc(5)
_TICKS = os.sysconf("SC_CLK_TCK")


class Usage(NamedTuple):
    """Of the daemon since its start, and of the disk; None if there is none, or it is not ours to
    look at."""

    cpu_seconds: float | None = None
    peak_bytes: int | None = None
    disk_bytes: int | None = None


class Workload(Watched, Protocol):
    """A container that is to be started, or was."""

    def start(self, environment: Mapping[str, str]) -> None:
        """Start it; `environment` goes before what the image sets."""

    def pid(self) -> int | None:
        """Its process, once the container was made; its program may start later."""

    def stop(self) -> None:
        """Kill it and remove the container; fine if nothing is there."""


class Node(Protocol):
    """A node with nothing of an image on it, until `pull`."""

    def pull(self, reference: str) -> None:
        """Have the image ready to be started. Raises DemoError."""

    def workload(self, image: Image, reference: str, network: Path) -> Workload:
        """A container of the image, to be started, in a network namespace."""

    def usage(self) -> Usage:
        """What it has cost."""

    def close(self) -> None:
        """End and remove everything."""

    # What follows is so without FirstByte.

    def local(self) -> Local | None:
        """How much of its images is here; None if all of it always is. Raises DemoError if they are
        not served as they should be."""
        return None

    def needed_bytes(self) -> int | None:
        """What was fetched because somebody waited for it, or was about to, if that is known."""
        return None

    def fuse_requests(self) -> int | None:
        """What the kernel has asked of FirstByte so far, if there is one."""
        return None

    def unpacked(self) -> list[Path]:
        """Where the layers of what was pulled are unpacked, if they are."""
        return []


def usage_of(pid: int, directories: Sequence[Path]) -> Usage:
    """What a process has taken, and what is in these directories. Raises BenchError if it ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        peak = _PEAK.search(Path(f"/proc/{pid}/status").read_text())
    except OSError as error:
        raise BenchError("a daemon that was measured has ended") from error
    cpu = (int(fields[11]) + int(fields[12])) / _TICKS
    return Usage(cpu, int(peak[1]) * 1024 if peak else 0, disk_of(directories))


def disk_of(directories: Sequence[Path]) -> int:
    """The bytes of disk that files in directories take."""
    return sum(map(_disk, directories))


def _disk(directory: Path) -> int:
    total = 0
    for folder, _, names in os.walk(directory):
        for name in names:
            try:
                total += os.lstat(os.path.join(folder, name)).st_blocks * 512
            except FileNotFoundError:
                continue  # a temporary file
    return total


def remove(directory: Path) -> None:
    """Remove a directory, unless something is mounted in it."""
    if directory.exists() and not mounts_below(directory):
        shutil.rmtree(directory)
