"""HTTP statuses of 400 and above, as typed errors with what the registry said."""

from __future__ import annotations

import re
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING

import msgspec

from snapshotter.registry.errors import (
    ForbiddenError,
    NotFoundError,
    ProtocolError,
    ProxyError,
    RateLimitedError,
    RegistryError,
    ServerError,
    UnauthorizedError,
)

if TYPE_CHECKING:
    from datetime import datetime

MAX_EXPLANATION = 8 << 10
"""Bytes of an error's body that are read for its explanation."""

PROXY_LOGIN = "name user and password in the proxy's URL: http://USER:PASSWORD@HOST:PORT"

_MAX_SAID = 200  # characters of it that are shown
_UNPRINTABLE = re.compile(r"[^\x20-\x7e\xa0-\U0010ffff]+")


class _Error(msgspec.Struct):
    code: str = ""
    message: str = ""


class _Errors(msgspec.Struct):
    errors: list[_Error] = []


def error_of(
    status: int, what: str, *, body: bytes, retry_after: str | None, now: datetime
) -> RegistryError:
    """The error for an answer with `status` >= 400 to a request for `what`.

    `retry_after` is that header, `now` the time to reckon its date from.
    """
    said = explanation(body)
    detail = f" ({said})" if said else ""
    seconds = parse_retry_after(retry_after, now)
    match status:
        case 401:
            hint = "docker login; a registry may also answer so for what does not exist"
            return UnauthorizedError(f"{what}: login required{detail}", hint=hint)
        case 403:
            return ForbiddenError(f"{what}: access denied{detail}")
        case 404:
            return NotFoundError(f"{what}: not found{detail}")
        case 407:
            return ProxyError(f"{what}: the proxy wants to know who asks", hint=PROXY_LOGIN)
        case 429:
            hint = f"wait {seconds:.0f} seconds" if seconds else "wait, or docker login"
            return RateLimitedError(
                f"{what}: too many requests{detail}", retry_after=seconds, hint=hint
            )
        case 408:
            return ServerError(f"{what}: server timed out{detail}", retry_after=seconds)
        case _ if status >= 500:
            return ServerError(f"{what}: server error {status}{detail}", retry_after=seconds)
        case _:
            return ProtocolError(f"{what}: unexpected status {status}{detail}")


def explanation(body: bytes) -> str:
    """What a registry's error body says, in one line; empty if it is not in the spec's form."""
    try:
        errors = msgspec.json.decode(body, type=_Errors).errors
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return ""
    text = "; ".join(error.message or error.code for error in errors)
    return _UNPRINTABLE.sub(" ", text).strip()[:_MAX_SAID]


def parse_retry_after(text: str | None, now: datetime) -> float | None:
    """Seconds from `now` that a Retry-After header asks for, by number or date; None if none."""
    if text is None:
        return None
    if re.fullmatch(r"[0-9]{1,9}", text.strip()):
        return float(text)
    try:
        date = parsedate_to_datetime(text)
    except ValueError:
        return None
    if date.tzinfo is None:  # "-0000": UTC by RFC 9110
        date = date.replace(tzinfo=now.tzinfo)
    return max(0.0, (date - now).total_seconds())
