"""One server that a registry's images may be had from: the registry itself, or a mirror of it."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING

from snapshotter.registry.endpoint import DEFAULT_REGISTRY_HOST, Endpoint, endpoint_of
from snapshotter.registry.reference import DEFAULT_REGISTRY

if TYPE_CHECKING:
    import ssl


class Capability(enum.Flag):
    """What a host can do, and is trusted with."""

    PULL = enum.auto()
    RESOLVE = enum.auto()
    PUSH = enum.auto()
    REFERRERS = enum.auto()


EVERYTHING = Capability.PULL | Capability.RESOLVE | Capability.PUSH | Capability.REFERRERS


class Use(enum.Enum):
    """What a request is for.

    `CONTENT` is named by its digest: whatever host it comes from, it is what it should be. A tag
    and a list of referrers are what the host says they are.
    """

    CONTENT = "pull"
    TAG = "resolve tags"
    REFERRERS = "list referrers"
    PUSH = "push"


@dataclass(frozen=True, slots=True)
class TlsContexts:
    """How to speak TLS: with the host itself, and with servers that it sends us `elsewhere` to.

    Those are trusted by the same rules, as in containerd, but do not get to see the client's
    certificate. Compared by identity, as contexts are.
    """

    own: ssl.SSLContext
    elsewhere: ssl.SSLContext


@dataclass(frozen=True, slots=True)
class Host:
    """A server, and how to deal with it.

    `account` is the registry whose credentials are meant for this host. `namespace` is said to a
    mirror as `?ns=`: the registry it stands in for; empty for the registry itself. `headers` are
    sent to this host alone. `repository` is what the repository is called there, if it is called
    something else than in the reference. `tls` None trusts what the system trusts. `dial_timeout`
    is in seconds.
    """

    endpoint: Endpoint
    account: str
    namespace: str = ""
    repository: str = ""
    capabilities: Capability = EVERYTHING
    headers: tuple[tuple[str, str], ...] = ()
    tls: TlsContexts | None = None
    dial_timeout: float | None = None

    def may(self, use: Use) -> bool:
        """Whether to send such requests here. The rules are containerd's, except that hosts
        trusted with tags are also asked for referrers."""
        match use:
            case Use.CONTENT:
                return Capability.PULL in self.capabilities
            case Use.TAG:
                return Capability.PULL | Capability.RESOLVE in self.capabilities
            case Use.REFERRERS:
                return bool(self.capabilities & (Capability.RESOLVE | Capability.REFERRERS))
            case Use.PUSH:
                return Capability.PUSH in self.capabilities


def registry_host(registry: str, *, plain_http: bool | None = None) -> Host:
    """The registry itself, if nothing is configured about it. `plain_http` as for `endpoint_of`."""
    return Host(endpoint_of(registry, plain_http=plain_http), registry)


def is_mirror(host: str, registry: str) -> bool:
    """Whether `host`, with its port if it has one, is not the registry's own."""
    return host != registry and (host, registry) != (DEFAULT_REGISTRY_HOST, DEFAULT_REGISTRY)


def account_of(host: str) -> str:
    """The registry that `host` is, as credentials are filed."""
    return DEFAULT_REGISTRY if host == DEFAULT_REGISTRY_HOST else host
