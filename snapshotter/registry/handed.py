"""Credentials that somebody has handed over for one image: in memory alone, and not for long."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import trio

if TYPE_CHECKING:
    from snapshotter.registry.auth import Credential
    from snapshotter.registry.reference import Reference

LIFETIME = 3600.0
"""Seconds. A pull needs them at once, the download behind it until it is over; a guess."""

MOST = 256
"""Images that have any at a time; the one that has had them longest goes first."""

_LOOK_SECONDS = 60.0  # what is too old stays in memory for so long at most


class HandedCredentials:
    """By what an image is called where it is asked for. For the trio thread."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str, str, str], Credential] = {}  # the oldest first

    def put(self, reference: Reference, credential: Credential | None) -> None:
        """Use a credential for this image from now on, in the place of an earlier one; None: use
        none that was handed over."""
        key = (reference.registry, reference.repository, reference.selector)
        self._kept.pop(key, None)
        if credential is not None:
            self._kept[key] = replace(credential, expires=trio.current_time() + LIFETIME)
            if len(self._kept) > MOST:
                del self._kept[next(iter(self._kept))]

    def get(self, registry: str, repository: str, selector: str) -> Credential | None:
        """That for an image of a registry, by tag or digest; no other image's will do."""
        credential = self._kept.get((registry, repository, selector))
        return None if credential is None or _is_over(credential) else credential

    def drop(self, credential: Credential) -> bool:
        """Forget a credential that was refused; tells if it was one of these."""
        before = len(self._kept)
        self._kept = {key: kept for key, kept in self._kept.items() if kept != credential}
        return len(self._kept) < before

    async def forget_in_time(self) -> None:
        """Let go of what nobody gets any more, until cancelled."""
        while True:
            await trio.sleep(_LOOK_SECONDS)
            self._kept = {key: kept for key, kept in self._kept.items() if not _is_over(kept)}


def _is_over(credential: Credential) -> bool:
    return trio.current_time() >= credential.expires
