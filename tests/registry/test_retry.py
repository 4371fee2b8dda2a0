"""When to try again."""

from __future__ import annotations

import random
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from snapshotter.registry.errors import (
    NetworkError,
    NotFoundError,
    RateLimitedError,
    RegistryError,
    ServerError,
)
from snapshotter.registry.retry import RetryPolicy, retry
from snapshotter.registry.status import error_of, parse_retry_after

NOW = datetime(2026, 11, 22, 12, 0, tzinfo=UTC)


@given(st.integers(1, 10_000), st.integers(1, 20_000), st.integers())
def test_delays_are_bounded(attempt: int, attempts: int, seed: int) -> None:
    """A transient error is retried within the policy's bounds, and never past its attempts."""
    policy = RetryPolicy(attempts=attempts, base=0.5, longest=15)
    delay = policy.delay(attempt, NetworkError("x"), rng=random.Random(seed))
    if attempt >= attempts:
        assert delay is None
    else:
        assert delay is not None
        bound = min(15, 0.5 * 2 ** min(attempt - 1, 10))
        assert bound / 2 <= delay <= bound


@pytest.mark.parametrize("kind", [RateLimitedError, ServerError])
def test_retry_after(kind: type[RateLimitedError]) -> None:
    """The server's word replaces the backoff, unless it asks for too long."""
    policy = RetryPolicy(longest_retry_after=60)
    rng = random.Random(0)
    assert policy.delay(1, kind("x", retry_after=60), rng=rng) == 60
    assert policy.delay(1, kind("x", retry_after=61), rng=rng) is None


def test_retry_after_header() -> None:
    """Seconds or a date, in the past or the future; anything else is as if it were not there."""
    date = format_datetime(NOW + timedelta(seconds=90), usegmt=True)
    assert parse_retry_after("120", NOW) == 120
    assert parse_retry_after(date, NOW) == 90
    assert parse_retry_after("Thu, 01 Jan 1970 00:00:00 GMT", NOW) == 0
    for text in (None, "", "soon", "-1", "1e9", "99999999999"):
        assert parse_retry_after(text, NOW) is None


@given(st.integers(400, 599), st.binary(max_size=60), st.text(max_size=20) | st.none())
def test_any_error_answer(status: int, body: bytes, retry_after: str | None) -> None:
    """Any answer of 400 and above is one typed error of one line."""
    error = error_of(status, "it", body=body, retry_after=retry_after, now=NOW)
    assert isinstance(error, RegistryError)
    assert error.message.startswith("it: ")
    assert "\n" not in str(error)
    assert error.transient == (status in (408, 429) or status >= 500)


class Flaky:
    """Fails with each error in turn, then succeeds."""

    def __init__(self, *errors: RegistryError) -> None:
        self._errors = list(errors)
        self.calls = 0

    async def __call__(self) -> str:
        self.calls += 1
        if self._errors:
            raise self._errors.pop(0)
        return "done"


async def test_transient_errors_are_outlived(autojump_clock: trio.testing.MockClock) -> None:
    """Success after failures is success."""
    operation = Flaky(NetworkError("1"), ServerError("2"), RateLimitedError("3", retry_after=30))
    assert await retry(operation, RetryPolicy()) == "done"
    assert operation.calls == 4


async def test_lasting_errors_are_raised_at_once() -> None:
    """What will not change is not asked again."""
    operation = Flaky(NotFoundError("gone"))
    with pytest.raises(NotFoundError):
        await retry(operation, RetryPolicy())
    assert operation.calls == 1


async def test_last_error_is_raised(autojump_clock: trio.testing.MockClock) -> None:
    """When attempts run out, the error is the last one."""
    operation = Flaky(*(NetworkError(str(number)) for number in range(9)))
    with pytest.raises(NetworkError, match=r"^2$"):
        await retry(operation, RetryPolicy(attempts=3))


async def test_deadline(autojump_clock: trio.testing.MockClock) -> None:
    """All attempts together end at the deadline, with the reason if one is known."""
    with pytest.raises(ServerError, match="busy"):
        await retry(Flaky(ServerError("busy", retry_after=50)), RetryPolicy(deadline=10))
    with pytest.raises(NetworkError, match="within 10 seconds"):
        await retry(trio.sleep_forever, RetryPolicy(deadline=10))
    assert trio.current_time() == pytest.approx(autojump_clock.current_time())
