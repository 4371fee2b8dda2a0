"""Views whose entries come and go, made up by the daemon.

What the kernel asks about them may take a while to answer, and it may remember nothing of it.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

from snapshotter.fuse.view import View

if TYPE_CHECKING:
    from collections.abc import Iterable


@dataclass(frozen=True, slots=True)
class Call:
    """A request of the kernel, by a number that it has for no other request of this mount. `again`
    says that it is delivered again: a predecessor has read it, may have done what it means, and has
    not answered."""

    number: int
    again: bool


class LiveView(View):
    """Answers of `image` hold for the moment. Inode numbers that are not known any more are stale:
    the kernel looks the path up again."""

    @abstractmethod
    def knows(self, nid: int) -> bool:
        """Whether there is such an inode."""

    @abstractmethod
    async def find(self, nid: int, name: bytes) -> tuple[View, int] | None:
        """What a name in a directory stands for; it may be in another view."""

    @abstractmethod
    def entries(self, nid: int) -> Iterable[tuple[bytes, View, int]]:
        """What is listed in a directory."""

    def has_noticed(self, call: Call) -> bool:
        """Whether a predecessor has noticed a call and not answered it."""
        return False

    async def noticed_create(self, nid: int, name: bytes, call: Call) -> bool:
        """Somebody wants to make a file; tells whether that meant something. None is made."""
        return False

    async def noticed_rmdir(self, nid: int, name: bytes, call: Call) -> bool:
        """Somebody wants to remove a directory; tells whether that meant something. None is."""
        return False
