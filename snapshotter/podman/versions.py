"""Which podman and CRI-O are on the node, and what they can do with a layer store."""

from __future__ import annotations

import re
import subprocess

_SECONDS = 10.0
_NUMBERS = re.compile(r"\bv?(\d{1,4})\.(\d{1,4})(?:\.\d+)?")

Numbers = tuple[int, int]

ASKS_FOR_BLOBS = (3, 3)
"""podman from here on, before ASKS_FOR_TABLES, asks a layer store for layers by their digests."""

ASKS_FOR_TABLES = (5, 1)
"""podman from here on asks by the digests of tables of contents (containers/storage 1.54)."""

HANDS_CREDENTIALS = (5, 2)
"""podman from here on can tell a layer store with whose credentials it pulls."""

FORGETS_LAYERS = (5, 4)
"""podman from here on does not write down what it has from a layer store (containers/storage 1.57:
`PutAdditionalLayer` sets no `location`, and only layers that have one are saved). An image that it
has pulled so is damaged for the next command. Seen with 5.4.2 and 5.8.6."""

CRIO_FORGETS_LAYERS = (1, 33)
"""CRI-O from here on has that containers/storage, too."""


def podman_version() -> Numbers | None:
    """That of the podman on PATH, or None if there is none that tells. Blocks."""
    return _version("podman")


def may_answer_tables() -> bool:
    """Whether asking by tables of contents does no harm to what is on this node. Blocks."""
    podman, crio = podman_version(), _version("crio")
    return (
        (podman is not None or crio is not None)
        and (podman is None or ASKS_FOR_TABLES <= podman < FORGETS_LAYERS)
        and (crio is None or crio < CRIO_FORGETS_LAYERS)
    )


def _version(program: str) -> Numbers | None:
    try:
        done = subprocess.run(
            [program, "--version"], capture_output=True, text=True, timeout=_SECONDS, check=False
        )
    except (OSError, subprocess.SubprocessError):
        return None
    found = _NUMBERS.search(done.stdout)
    return (int(found[1]), int(found[2])) if found else None
