"""What a reader of a lazily fetched image can run into."""

from __future__ import annotations

from index.errors import FirstByteError


class FetchError(FirstByteError):
    """Bytes could not be had: not in time, not at all, or not the right ones.

    `__cause__` says why. It concerns this one attempt; reading again starts afresh.
    """
