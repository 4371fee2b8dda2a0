"""Which images were not served lazily, and why: for those who ask later."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from snapshotter.containerd.database import Database
    from snapshotter.containerd.lazy import Refused

_KEPT = 200
_ONE_PULL = 600 * 10**9  # ns; layers of an image refused within this are taken for one pull


class Fallback(msgspec.Struct, frozen=True):
    """An image that was refused for one reason.

    `layers` counts layers that were unpacked instead, `latest_ns` is the time of the last one
    (since the epoch). `reference` and `image` (the manifest's digest) are empty if unknown.
    """

    reference: str
    image: str
    kind: str
    reason: str
    layers: int
    latest_ns: int


class Fallbacks:
    """The most recent of them, on disk. Thread-safe; methods wait for the disk."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def add(self, refused: Refused) -> bool:
        """Count a layer; says whether it is the first one of a pull. Raises StoreError."""
        now = time.time_ns()
        known = (refused.reference, refused.kind, refused.reason)
        with self._database.transaction() as run:
            before = run.execute(
                "SELECT latest_ns FROM fallbacks WHERE (reference, kind, reason) = (?, ?, ?)",
                known,
            ).fetchone()
            run.execute(
                "INSERT INTO fallbacks (reference, kind, reason, image, layers, latest_ns)"
                " VALUES (?, ?, ?, ?, 1, ?) ON CONFLICT (reference, kind, reason) DO UPDATE SET"
                " image = excluded.image, layers = layers + 1, latest_ns = excluded.latest_ns",
                (*known, refused.image, now),
            )
            run.execute(
                "DELETE FROM fallbacks WHERE id NOT IN"
                " (SELECT id FROM fallbacks ORDER BY latest_ns DESC, id DESC LIMIT ?)",
                (_KEPT,),
            )
        return before is None or now - before[0] > _ONE_PULL

    def latest(self) -> list[Fallback]:
        """The most recent first, at most 200. Raises StoreError."""
        with self._database.reading() as run:
            rows = run.execute(
                "SELECT reference, image, kind, reason, layers, latest_ns FROM fallbacks"
                " ORDER BY latest_ns DESC, id DESC"
            ).fetchall()
        return [Fallback(*row) for row in rows]
