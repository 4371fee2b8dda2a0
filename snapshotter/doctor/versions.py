"""Version numbers of containerd and of the kernel."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Self

_NUMBERS = re.compile(r"(?<![\w.])v?(\d{1,6})\.(\d{1,6})(?:\.(\d{1,6}))?")


@dataclass(frozen=True, slots=True, order=True)
class Version:
    """The numbers that features depend on; pre-releases count as the release."""

    major: int
    minor: int
    patch: int = 0

    @classmethod
    def find(cls, text: str) -> Self | None:
        """The first version in a text, such as the output of `containerd --version`."""
        if match := _NUMBERS.search(text):
            return cls(int(match[1]), int(match[2]), int(match[3] or 0))
        return None

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}.{self.patch}"


CONTAINERD_RELATIVE_IMPORTS = Version(1, 7)
"""Relative patterns of imports start at the file that has them."""

CONTAINERD_EXPORTS = Version(1, 7, 16)
"""CRI asks the proxy plugin's exports where the snapshotter's root is."""

CONTAINERD_2 = Version(2, 0)
"""The CRI plugin is in parts, and the configuration has version 3."""

CONTAINERD_TRANSFER = Version(2, 1)
"""CRI pulls through the transfer service, which knows snapshotters that fetch by themselves."""

KERNEL_FUSE_IDMAP = Version(6, 12)
"""FUSE file systems can be mounted with mapped ids."""
