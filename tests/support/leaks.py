"""What a daemon holds of this machine: to be equal before and after, whatever happened between."""

from __future__ import annotations

import os
import re
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from tests.support.instance import POLL_SECONDS, WAIT_SECONDS

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.support.instance import Instance

T = TypeVar("T")

_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Footprint:
    """Of one process. `files` counts those that it has open by name, digests in it left out.

    `other` counts open sockets, pipes and the like, `resident` bytes of memory.
    """

    files: Counter[str]
    other: int
    threads: int
    resident: int


def footprint(pid: int) -> Footprint:
    """What the process holds now."""
    names = []
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            names.append(_DIGEST.sub("*", os.readlink(entry)))
        except FileNotFoundError:  # closed meanwhile
            continue
    files = Counter(name for name in names if name.startswith("/"))
    status = Path(f"/proc/{pid}/status").read_text()
    return Footprint(
        files=files,
        other=len(names) - files.total(),
        threads=_number(status, "Threads"),
        resident=_number(status, "VmRSS") << 10,
    )


def left_in(here: Instance) -> list[str]:
    """What of images and snapshots is on disk and in the FUSE mount of a daemon that runs."""
    folders = ("layers", "indexes", "images", "containerd/snapshots")
    on_disk = {f"{name}/{entry}" for name in folders for entry in os.listdir(here.root / name)}
    # An index's tree in a file of its own comes when somebody wants the image in native mode.
    on_disk -= {entry.replace(".index", ".erofs") for entry in on_disk if ".index" in entry}
    return sorted([*on_disk, *(f"fs/{name}" for name in shown_in(here))])


def shown_in(here: Instance) -> list[str]:
    """What of images is in the FUSE mount. podman's layer store is always there."""
    return sorted(set(os.listdir(here.state / "fs")) - {"podman-layers"})


def becomes(probe: Callable[[], T], expected: T) -> None:
    """Wait until something has a value; the time only bounds a failure, which shows the value."""
    deadline = time.monotonic() + WAIT_SECONDS
    while (found := probe()) != expected and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    assert found == expected, f"{found} has not become {expected}"


def _number(status: str, name: str) -> int:
    match = re.search(rf"^{name}:\s+(\d+)", status, re.MULTILINE)
    assert match
    return int(match[1])
