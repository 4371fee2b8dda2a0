"""One repository, on all hosts that have it: whom to ask, in what order, and whom to leave alone.

A mirror has one attempt, and one that failed is asked last for a while. The registry's own server
is always asked if no mirror has given an answer, and what it says when all fail is the error.
"""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, TypeVar

import trio

from index.errors import IntegrityError
from snapshotter.registry.errors import (
    ForbiddenError,
    HostsError,
    NetworkError,
    RateLimitedError,
    RegistryError,
    ServerError,
    UnauthorizedError,
)
from snapshotter.registry.health import REST, Health
from snapshotter.registry.host import Host, Use, registry_host
from snapshotter.registry.session import Session

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from snapshotter.registry.credentials import CredentialStore
    from snapshotter.registry.hosts_tree import HostsTree
    from snapshotter.registry.reference import Reference
    from snapshotter.registry.transport import Transport

log = logging.getLogger(__name__)

_T = TypeVar("_T")

LOOK_AGAIN = 1.0
"""Seconds for which the hosts are believed without looking at the files that name them: that takes
two hops to threads, and a start makes 150 requests."""

_UNKNOWN: tuple[tuple[Host, ...], float] = ((), -math.inf)
"""Hosts, and until when they are believed."""

_LONGEST_REST = 600.0  # seconds; a guess: what a mirror's Retry-After can ask for


class Repository:
    """One repository of one registry. Sessions, with what they have learnt, last as long as it.

    Which mirrors rest is known for all repositories together, in the transport's `health`; which
    of them lack something is known here.
    """

    def __init__(
        self,
        reference: Reference,
        transport: Transport,
        credentials: CredentialStore,
        *,
        hosts: HostsTree | None = None,
        plain_http: bool | None = None,
    ) -> None:
        """Without `hosts` there is the registry itself alone. `plain_http` as for `endpoint_of`."""
        self.reference = reference
        self._transport = transport
        self._credentials = credentials
        self._tree = hosts
        self._plain_http = plain_http
        # By host and whether it is hurried, in order; empty before the first request.
        self._sessions: dict[tuple[Host, bool], Session] = {}
        self._lacking = Health()  # by host and what it lacks; "" is everything
        self._complaint = ""
        self._known = _UNKNOWN

    async def first(
        self, use: Use, subject: str, operation: Callable[[Session], Awaitable[_T]]
    ) -> _T:
        """What `operation` gives on the first host where it succeeds.

        `subject` names what is asked for, the same in each call. Hosts that rest are asked when the
        others have failed in a way that need not last, or for content: any host may have that.
        Raises the error of the last host in order. For content it is `transient` if that of any
        host is: a mirror that does not answer may have what the registry denies us.
        """
        sessions = await self._candidates(use)
        last = sessions[-1]
        resting = [one for one in sessions if one is not last and self._rests(one, subject)]
        errors: dict[Session, RegistryError | IntegrityError] = {}
        for session in [*(one for one in sessions if one not in resting), *resting]:
            if session in resting and use is not Use.CONTENT and not _is_transient(errors[last]):
                break
            try:
                result = await operation(session)
            except (RegistryError, IntegrityError) as error:
                errors[session] = error
                self.failed(session, subject, error)
            else:
                self._transport.health.wake(session.endpoint.base)
                return result
        final = errors[last]
        if use is Use.CONTENT and isinstance(final, RegistryError):
            final.transient = any(map(_is_transient, errors.values()))
        raise final

    async def only(self, use: Use) -> Session:
        """The first host for `use`, to stay with. Raises HostsError."""
        session = (await self._candidates(use))[0]
        # Nothing stands in for it: what was begun there must be finished there.
        return self._session(session.host, False)

    def failed(self, session: Session, subject: str, error: RegistryError | IntegrityError) -> None:
        """Leave a mirror alone for a while: for everything if it gave no answer, else for what it
        lacks. Call it for failures after `first` has returned, too."""
        self._known = _UNKNOWN  # somebody may be mending the files
        if not session.hurried:
            return
        base = session.endpoint.base
        if isinstance(error, NetworkError | ServerError | RateLimitedError):
            told = getattr(error, "retry_after", None) or 0.0
            seconds = min(max(REST, told), _LONGEST_REST)
            if self._transport.health.rest(base, seconds):
                log.warning("%s: %s; it is asked last for %.0f s", base, error.message, seconds)
            return
        log.info("%s: %s; asking another host", base, error.message)
        denied = isinstance(error, UnauthorizedError | ForbiddenError)
        self._lacking.rest((base, "" if denied else subject))

    def doubt(self, subject: str) -> None:
        """What came as `subject` was not it, as only the caller can tell: ask the registry's own
        server before any mirror for a while."""
        for session in self._sessions.values():
            if session.hurried:
                self._lacking.rest((session.endpoint.base, subject))

    def _rests(self, session: Session, subject: str) -> bool:
        base = session.endpoint.base
        return self._transport.health.rests(base) or any(
            self._lacking.rests((base, what)) for what in ("", subject)
        )

    async def _candidates(self, use: Use) -> list[Session]:
        """The hosts for `use`, in order, at least one. Raises HostsError."""
        hosts = await self._hosts()
        keys = [(host, position < len(hosts)) for position, host in enumerate(hosts, start=1)]
        if keys != list(self._sessions):
            self._sessions = {key: self._sessions.get(key) or self._session(*key) for key in keys}
        found = [one for one in self._sessions.values() if one.host.may(use)]
        if not found:
            raise HostsError(
                f"no host of {self.reference.registry} may {use.value}",
                hint="see the capabilities in its hosts.toml, or the mirrors in registries.conf",
            )
        return found

    async def _hosts(self) -> tuple[Host, ...]:
        """As the tree has had them within LOOK_AGAIN; as they were when it cannot be read and they
        are in use: an editor's mistake must not stop containers that run."""
        registry = self.reference.registry
        if self._tree is None:
            return (registry_host(registry, plain_http=self._plain_http),)
        hosts, until = self._known
        if trio.current_time() < until:
            return hosts
        try:
            hosts = await self._tree.lookup(self.reference, plain_http=self._plain_http)
        except HostsError as error:
            if not self._sessions:
                raise
            if error.message != self._complaint:
                self._complaint = error.message
                log.error("%s; using the hosts of %s as they were", error, registry)
            return tuple(host for host, _ in self._sessions)
        self._complaint = ""
        self._known = hosts, trio.current_time() + LOOK_AGAIN
        return hosts

    def _session(self, host: Host, hurried: bool) -> Session:
        return Session(self.reference, host, self._transport, self._credentials, hurried=hurried)


def _is_transient(error: RegistryError | IntegrityError) -> bool:
    return isinstance(error, RegistryError) and error.transient
