"""Who failed a moment ago and is left alone for a while. Decides an order, never an answer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

if TYPE_CHECKING:
    from collections.abc import Hashable

REST = 30.0
"""Seconds for which a mirror that failed is not asked if another host will do. A guess: a dead one
then costs its connect timeout twice a minute, and one that is back is used half a minute later."""


class Health:
    """What rests, and until when. For the trio thread."""

    def __init__(self) -> None:
        self._until: dict[Hashable, float] = {}

    def rest(self, key: Hashable, seconds: float = REST) -> bool:
        """Let `key` rest from now on; whether it was awake before."""
        now = trio.current_time()
        self._until = {other: until for other, until in self._until.items() if until > now}
        was_awake = key not in self._until
        self._until[key] = max(now + seconds, self._until.get(key, 0.0))
        return was_awake

    def wake(self, key: Hashable) -> None:
        """`key` answered: it need not rest."""
        self._until.pop(key, None)

    def rests(self, key: Hashable) -> bool:
        """Whether `key` failed a moment ago."""
        return trio.current_time() < self._until.get(key, 0.0)
