"""When to try again, and when to give up. Only errors that say they are transient are retried."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import trio

from snapshotter.registry.errors import (
    NetworkError,
    RateLimitedError,
    RegistryError,
    ServerError,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Exponential backoff with full jitter, between bounds.

    `attempts` counts the first one. The delay before attempt n + 1 is drawn from half to all of
    `base` · 2ⁿ⁻¹ seconds, never more than `longest`. A Retry-After is obeyed instead if it is at
    most `longest_retry_after` seconds: whoever is told to wait longer is told so. `deadline` is
    in seconds for all attempts together.
    """

    attempts: int = 5
    base: float = 0.5
    longest: float = 15
    longest_retry_after: float = 60
    deadline: float = math.inf

    def delay(self, attempt: int, error: RegistryError, *, rng: random.Random) -> float | None:
        """Seconds to wait after `attempt` (from 1) failed with `error`; None: give up."""
        if attempt >= self.attempts or not error.transient:
            return None
        if isinstance(error, RateLimitedError | ServerError) and error.retry_after is not None:
            return error.retry_after if error.retry_after <= self.longest_retry_after else None
        # 2³⁰ · base is beyond any bound, and 2ⁿ must not overflow
        backoff = min(self.longest, math.ldexp(self.base, min(attempt - 1, 30)))
        return backoff * rng.uniform(0.5, 1)


async def retry(operation: Callable[[], Awaitable[_T]], policy: RetryPolicy) -> _T:
    """Await `operation()` until it succeeds or `policy` gives up; then its last error is raised.

    When the deadline cuts an attempt off before any has failed, that is a NetworkError.
    """
    last: RegistryError | None = None
    rng = random.Random()  # noqa: S311  (spreads load, guards nothing)
    with trio.move_on_after(policy.deadline):
        attempt = 0
        while True:
            attempt += 1
            try:
                return await operation()
            except RegistryError as error:
                last = error
                delay = policy.delay(attempt, error, rng=rng)
                if delay is None:
                    raise
            await trio.sleep(delay)
    raise last or NetworkError(f"no answer within {policy.deadline:g} seconds")
