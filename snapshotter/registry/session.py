"""Requests to one repository on one host: authorised, redirected, and with failures as errors."""

from __future__ import annotations

from contextlib import aclosing
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, urlencode, urljoin, urlsplit

import trio

from snapshotter.registry import auth
from snapshotter.registry.endpoint import is_loopback
from snapshotter.registry.errors import (
    ForbiddenError,
    ProtocolError,
    UnauthorizedError,
)
from snapshotter.registry.status import MAX_EXPLANATION, error_of

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Mapping

    from snapshotter.registry.credentials import CredentialStore
    from snapshotter.registry.errors import RegistryError
    from snapshotter.registry.host import Host
    from snapshotter.registry.reference import Reference
    from snapshotter.registry.transport import Response, Transport

_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_MAX_REDIRECTS = 5
_REFERRERS_REMEMBERED = 3600.0  # seconds; a guess at how late an update of a registry may be seen


class Session:
    """One repository as one host has it, and the authorisation to use it.

    Authorization and the host's own headers go to its scheme, host and port and nowhere else.
    """

    def __init__(
        self,
        reference: Reference,
        host: Host,
        transport: Transport,
        credentials: CredentialStore,
        *,
        hurried: bool = False,
    ) -> None:
        """`hurried`: another host can stand in for this one, so do not wait for long."""
        self.reference = reference
        self.host = host
        self.endpoint = host.endpoint
        self._repository = host.repository or reference.repository
        self.hurried = hurried
        self._transport = transport
        self._deadlines = transport.deadlines.hurried() if hurried else transport.deadlines
        self._credentials = credentials
        self._challenge: auth.Challenge | None = None
        self._password: auth.Password | None = None
        self._tokens = auth.TokenCache()
        self._renewing = trio.Lock()

    @property
    def has_referrers(self) -> bool | None:
        """Whether the host was found to have the referrers API, lately; None if nobody tried."""
        for there in (True, False):
            if self._transport.health.rests((self.endpoint.base, "referrers", there)):
                return there
        return None

    def note_referrers(self, *, there: bool) -> None:
        """The host has the referrers API, or lacks it."""
        health = self._transport.health
        health.wake((self.endpoint.base, "referrers", not there))
        health.rest((self.endpoint.base, "referrers", there), _REFERRERS_REMEMBERED)

    async def open(
        self,
        method: str,
        target: str,
        *,
        what: str,
        headers: Mapping[str, str] | None = None,
        body: bytes | AsyncGenerator[bytes, None] = b"",
        follow: bool = True,
        answer_within: float | None = None,
    ) -> Response:
        """The response to a request, whose status is then below 400; close it.

        `target` is a URL, or a path within the repository. `what` names it in errors. Redirects of
        GET and HEAD are followed if `follow`. A 401, or a 403 for credentials that may have
        expired, is answered with new ones, once; but a streamed body cannot be sent twice: then
        the error is transient. Raises RegistryErrors.
        """
        url = self._url(method, target)
        scope = self._scope(method)
        renewed = False
        for _ in range(_MAX_REDIRECTS + 2):  # one more for the renewal
            ours = self._is_ours(url)
            authorization = await self._authorization(scope) if ours else None
            response = await self._send(method, url, headers, authorization, body, answer_within)
            if response.status >= 400:
                error = await _failure(response, what)
                stale = ours and response.status == 401 and self._gives_way(authorization)
                if renewed and not stale:
                    raise error
                if not ours or not await self._renew(response, authorization, scope):
                    raise error
                if not isinstance(body, bytes):
                    error.transient = True
                    raise error
                renewed = True
            elif response.status in _REDIRECTS and follow and method in ("GET", "HEAD"):
                location = response.header("location")
                await response.discard()
                url = _redirect(url, location, what)
            else:
                return response
        raise ProtocolError(f"{what}: more than {_MAX_REDIRECTS} redirects")

    async def _send(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str] | None,
        authorization: str | None,
        body: bytes | AsyncGenerator[bytes, None],
        answer_within: float | None = None,
    ) -> Response:
        """One exchange. With a host of another origin only `headers` and `body` are shared."""
        sent = list((headers or {}).items())
        if authorization is not None:
            sent.append(("Authorization", authorization))
        host = self.host
        ours = self._is_ours(url)
        if ours:
            names = {name.lower() for name, _ in sent}
            sent += [pair for pair in host.headers if pair[0].lower() not in names]
        tls = None
        if host.tls is not None:
            tls = host.tls.own if ours else host.tls.elsewhere
        waits = self._deadlines
        if answer_within is not None:
            waits = replace(waits, answer=answer_within)
        opened = self._transport.open(
            method, url, sent, body, tls=tls, dial_timeout=host.dial_timeout, deadlines=waits
        )
        if isinstance(body, bytes):
            return await opened
        async with aclosing(body):
            return await opened

    def _url(self, method: str, target: str) -> str:
        """The URL of `target`. What a mirror is asked for, it is told for which registry."""
        url = urljoin(f"{self.endpoint.base}{self._repository}/", target)
        asks = url != target or (method in ("GET", "HEAD") and self._is_ours(url))
        query = urlsplit(url).query
        if not self.host.namespace or not asks or "ns" in parse_qs(query):
            return url
        return f"{url}{'&' if query else '?'}{urlencode({'ns': self.host.namespace})}"

    def _is_ours(self, url: str) -> bool:
        try:
            return self.endpoint.is_origin_of(url)
        except ValueError as error:  # a port out of range
            raise ProtocolError(f"{url[:200]!r} is not a URL to fetch from") from error

    def _scope(self, method: str) -> str:
        actions = "pull" if method in ("GET", "HEAD") else "pull,push"
        return f"repository:{self._repository}:{actions}"

    async def _authorization(self, scope: str) -> str | None:
        """The header to send by what earlier challenges taught; None before the first."""
        if self._challenge is None or self._challenge.scheme == "basic":
            return self._basic()
        if (held := self._held_token(self._challenge, scope)) is not None:
            return held
        async with self._renewing:
            return self._held_token(self._challenge, scope) or await self._new_token(
                self._challenge, scope
            )

    def _basic(self) -> str | None:
        """The header with the password that there is, unless its time is over."""
        if self._password is not None and trio.current_time() >= self._password.expires:
            self._password = None
        return None if self._password is None else auth.basic(self._password)

    def _gives_way(self, refused: str | None) -> bool:
        """Whether another password may be found in the place of a refused one."""
        password = self._password
        return (
            password is not None
            and refused == auth.basic(password)
            and self._credentials.refused(password)
        )

    def _held_token(self, challenge: auth.Challenge, scope: str) -> str | None:
        scopes = auth.scopes_of(challenge, scope)
        token = self._tokens.get(challenge, scopes, trio.current_time())
        return None if token is None else f"Bearer {token.value}"

    async def _renew(self, response: Response, refused: str | None, scope: str) -> bool:
        """Whether there is now another Authorization to try than the `refused` one."""
        challenge = self._challenge
        if response.status == 401:
            offered = auth.parse_challenges(response.header_values("www-authenticate"))
            by_scheme = {one.scheme: one for one in reversed(offered)}
            challenge = by_scheme.get("bearer") or by_scheme.get("basic")
        elif response.status != 403 or refused is None:
            return False
        if challenge is None:
            return False
        async with self._renewing:
            self._challenge = challenge
            if challenge.scheme == "basic":
                if self._basic() == refused:
                    credential = await self._find_credential()
                    self._password = credential if isinstance(credential, auth.Password) else None
                return self._basic() not in (None, refused)
            if refused is not None:
                self._tokens.drop(refused.removeprefix("Bearer "))
            if self._held_token(challenge, scope) is None:
                await self._new_token(challenge, scope)
            return True

    async def _new_token(self, challenge: auth.Challenge, scope: str) -> str:
        scopes = auth.scopes_of(challenge, scope)
        credential = await self._find_credential()
        request = auth.token_request(challenge, credential, scopes)
        server = urlsplit(request.url)
        host = server.netloc
        if (
            credential is not None
            and (server.scheme, self.endpoint.scheme) == ("http", "https")
            and not is_loopback(host)
        ):
            raise ProtocolError(
                f"{self.endpoint.host} wants credentials sent to {host} without TLS"
            )
        try:
            response = await self._send(
                request.method, request.url, request.headers, None, request.body
            )
            async with response:
                if response.status >= 400:
                    raise await _failure(response, f"login at {host}")
                raw = await response.read(auth.MAX_TOKEN_ANSWER)
        except (UnauthorizedError, ForbiddenError) as error:
            if (
                credential is not None
                and isinstance(error, UnauthorizedError)
                and self._credentials.refused(credential)
            ):
                return await self._new_token(challenge, scope)
            raise UnauthorizedError(
                f"{host} refuses the credentials for {self.host.account}"
                if credential is not None
                else f"{self.reference.name}: login required",
                hint=f"docker login {self.host.account}",
            ) from error
        token = auth.parse_token(raw or b"", now=trio.current_time(), host=host)
        self._tokens.put(challenge, scopes, token)
        return f"Bearer {token.value}"

    async def _find_credential(self) -> auth.Credential | None:
        return await self._credentials.lookup(
            self.host.account, self._repository, self.reference.selector
        )


async def _failure(response: Response, what: str) -> RegistryError:
    """Read why a request failed, and close the response."""
    async with response:
        body = await response.read(MAX_EXPLANATION)
    return error_of(
        response.status,
        what,
        body=body or b"",
        retry_after=response.header("retry-after"),
        now=datetime.now(UTC),
    )


def _redirect(url: str, location: str | None, what: str) -> str:
    """Where a redirect leads. ProtocolError if nowhere, or out of TLS."""
    if not location:
        raise ProtocolError(f"{what}: redirect to nowhere")
    target = urljoin(url, location)
    scheme = urlsplit(target).scheme
    if scheme not in ("http", "https"):
        raise ProtocolError(f"{what}: redirect to {target[:200]!r}")
    if urlsplit(url).scheme == "https" and scheme == "http":
        raise ProtocolError(f"{what}: redirect from TLS to plain HTTP at {urlsplit(target).netloc}")
    return target
