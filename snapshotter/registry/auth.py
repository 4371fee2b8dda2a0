"""Authentication towards a registry: challenges, token requests, token lifetimes. No I/O.

Sources: RFC 9110 section 11 (challenges), RFC 6750 (Bearer), distribution's `spec/auth/token.md`
(GET with scopes) and `spec/auth/oauth.md` (POST with a refresh token).
"""

from __future__ import annotations

import base64
import math
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from urllib.parse import urlencode, urlsplit, urlunsplit

import msgspec

from snapshotter.registry.errors import ProtocolError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

MAX_TOKEN_ANSWER = 1 << 20
"""Bytes of the largest answer of a token server that is read."""

_CLIENT_ID = "firstbyte"
_DEFAULT_LIFETIME = 60.0  # seconds; token.md, "expires_in"
_MARGIN = 0.1  # share of its lifetime by which a token is renewed early: clocks, and long requests


@dataclass(frozen=True, slots=True)
class Password:
    """A user's name and password (or an access token in its place).

    It is not to be used from `expires` on, a time of trio's clock.
    """

    username: str
    password: str = field(repr=False)
    expires: float = field(default=math.inf, compare=False)


@dataclass(frozen=True, slots=True)
class IdentityToken:
    """A refresh token, which a token server gives access tokens for. `expires` as of Password."""

    token: str = field(repr=False)
    expires: float = field(default=math.inf, compare=False)


Credential = Password | IdentityToken


@dataclass(frozen=True, slots=True)
class Challenge:
    """One way in that a 401 offers. `scheme` and parameter names are in lower case."""

    scheme: str
    parameters: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class TokenRequest:
    """The HTTP request that a Bearer challenge is answered with."""

    method: str
    url: str
    headers: Mapping[str, str]
    body: bytes


@dataclass(frozen=True, slots=True)
class Token:
    """An access token and when it stops being used, in the seconds of the caller's clock."""

    value: str = field(repr=False)
    expires: float


class _TokenAnswer(msgspec.Struct):
    token: str | None = None
    access_token: str | None = None
    expires_in: float | None = None


_SCHEME = re.compile(r"\s*([!#$%&'*+.^_`|~0-9A-Za-z-]+)(?=\s|,|$)")
_PARAMETER = re.compile(
    r"""\s*([!#$%&'*+.^_`|~0-9A-Za-z-]+)\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^\s,"]*))\s*(?=,|$)""",
    re.DOTALL,
)
_TOKEN68 = re.compile(r"\s+[A-Za-z0-9._~+/-]+=*\s*(?=,|$)")
_SEPARATOR = re.compile(r"[\s,]*")


def parse_challenges(values: Sequence[str]) -> list[Challenge]:
    """Read WWW-Authenticate headers, each with one or several challenges.

    What cannot be read ends its header line: the challenges before it count.
    """
    found: list[Challenge] = []
    for value in values:
        parameters: dict[str, str] | None = None
        at = 0
        while (at := _end(_SEPARATOR.match(value, at))) < len(value):
            if match := _PARAMETER.match(value, at):
                if parameters is None:
                    break
                quoted = match[2]
                text = match[3] if quoted is None else re.sub(r"\\(.)", r"\1", quoted, flags=re.S)
                parameters.setdefault(match[1].lower(), text)
            elif match := _SCHEME.match(value, at):
                parameters = {}
                found.append(Challenge(match[1].lower(), parameters))
                if opaque := _TOKEN68.match(value, match.end()):
                    match = opaque  # such as Negotiate's: not a parameter, of no use to us
            else:
                break
            at = match.end()
    return found


def _end(match: re.Match[str] | None) -> int:
    assert match is not None  # the pattern matches the empty string
    return match.end()


def basic(credential: Password) -> str:
    """The Authorization header of the Basic scheme (RFC 7617, UTF-8)."""
    pair = f"{credential.username}:{credential.password}".encode()
    return f"Basic {base64.b64encode(pair).decode('ascii')}"


def scopes_of(challenge: Challenge, wanted: str) -> tuple[str, ...]:
    """What to ask a token for: `wanted`, and what the challenge names besides."""
    named = challenge.parameters.get("scope", "").split()
    return tuple(dict.fromkeys([wanted, *named]))


def token_request(
    challenge: Challenge, credential: Credential | None, scopes: Sequence[str]
) -> TokenRequest:
    """The request for a token: anonymous, with a password, or with an identity token.

    ProtocolError if the challenge names no token server.
    """
    realm = challenge.parameters.get("realm", "")
    parts = urlsplit(realm)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ProtocolError(f"the registry names no token server (realm {realm[:200]!r})")
    service = challenge.parameters.get("service", "")
    query = [("service", service)] if service else []
    if isinstance(credential, IdentityToken):
        form = [
            ("grant_type", "refresh_token"),
            *query,
            ("client_id", _CLIENT_ID),
            ("scope", " ".join(scopes)),
            ("refresh_token", credential.token),
        ]
        headers = {"Content-Type": "application/x-www-form-urlencoded"}
        return TokenRequest("POST", realm, headers, urlencode(form).encode("ascii"))
    query += [("scope", scope) for scope in scopes]
    headers = {}
    if credential is not None:
        query.append(("account", credential.username))
        headers["Authorization"] = basic(credential)
    joined = "&".join(filter(None, (parts.query, urlencode(query))))
    return TokenRequest("GET", urlunsplit(parts._replace(query=joined)), headers, b"")


def parse_token(raw: bytes, *, now: float, host: str) -> Token:
    """Read a token server's answer, received at `now`. ProtocolError if there is no token in it."""
    try:
        answer = msgspec.json.decode(raw, type=_TokenAnswer)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"{host} answers a token request with something else") from error
    value = answer.token or answer.access_token
    if not value or not re.fullmatch(r"[\x21-\x7e]+", value):
        raise ProtocolError(f"{host} answers a token request without a token")
    lifetime = answer.expires_in if answer.expires_in and answer.expires_in > 0 else None
    return Token(value, now + (1 - _MARGIN) * (lifetime or _DEFAULT_LIFETIME))


class TokenCache:
    """Tokens by what they were given for: token server, service and scopes."""

    def __init__(self) -> None:
        self._tokens: dict[tuple[str, str, tuple[str, ...]], Token] = {}

    def get(self, challenge: Challenge, scopes: tuple[str, ...], now: float) -> Token | None:
        """A token that holds at `now`, if there is one."""
        token = self._tokens.get(self._key(challenge, scopes))
        return token if token is not None and now < token.expires else None

    def put(self, challenge: Challenge, scopes: tuple[str, ...], token: Token) -> None:
        """Keep a token in the place of its predecessor."""
        self._tokens[self._key(challenge, scopes)] = token

    def drop(self, value: str) -> None:
        """Forget a token that was refused, whatever it was for."""
        self._tokens = {key: token for key, token in self._tokens.items() if token.value != value}

    @staticmethod
    def _key(challenge: Challenge, scopes: tuple[str, ...]) -> tuple[str, str, tuple[str, ...]]:
        parameters = challenge.parameters
        return parameters.get("realm", ""), parameters.get("service", ""), scopes
