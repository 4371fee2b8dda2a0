"""What a snapshot is to containerd: plain values, in its own terms."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping


class Kind(enum.Enum):
    """What may be done with a snapshot; the values are containerd's words in filters."""

    VIEW = "view"  # read-only, made by View
    ACTIVE = "active"  # writable, made by Prepare
    COMMITTED = "committed"  # never changes again, and others can be based on it


@dataclass(frozen=True, slots=True)
class Info:
    """One snapshot. `parent` is a committed snapshot's name, or empty."""

    kind: Kind
    name: str
    parent: str
    labels: Mapping[str, str]
    created_ns: int  # since the epoch, UTC
    updated_ns: int


@dataclass(frozen=True, slots=True)
class Usage:
    """What a snapshot takes on disk, without its parents."""

    inodes: int
    size: int  # bytes


@dataclass(frozen=True, slots=True)
class Mount:
    """One mount that containerd makes, as of mount(8).

    `target` is a directory inside the mounts before it; empty is the root.
    """

    type: str
    source: str
    options: tuple[str, ...]
    target: str = ""
