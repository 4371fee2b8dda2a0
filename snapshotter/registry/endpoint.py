"""Where a registry is on the network: the one place that turns a name into hosts and schemes."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from urllib.parse import urlsplit

from snapshotter.registry.reference import DEFAULT_REGISTRY

DEFAULT_REGISTRY_HOST = "registry-1.docker.io"
_DEFAULT_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A server that speaks the distribution API.

    `host` may carry a port. `path` is the API's root: empty, or it starts with a slash and ends
    without one.
    """

    scheme: str
    host: str
    path: str = "/v2"

    @property
    def base(self) -> str:
        """The URL that API paths are appended to; ends in a slash."""
        return f"{self.scheme}://{self.host}{self.path}/"

    def is_origin_of(self, url: str) -> bool:
        """Whether credentials for this endpoint may go to `url`: same scheme, host and port."""
        return origin(url) == origin(self.base)


def origin(url: str) -> tuple[str, str, int | None]:
    """Scheme, host and port of a URL, comparable. ValueError if the port is malformed."""
    parts = urlsplit(url)
    return parts.scheme, parts.hostname or "", parts.port or _DEFAULT_PORTS.get(parts.scheme)


def endpoint_of(registry: str, *, plain_http: bool | None = None) -> Endpoint:
    """The endpoint of a reference's registry.

    `plain_http` None is the custom of container tools: HTTP for loopback hosts, TLS for others.
    """
    host = DEFAULT_REGISTRY_HOST if registry == DEFAULT_REGISTRY else registry
    if plain_http is None:
        plain_http = is_loopback(host)
    return Endpoint("http" if plain_http else "https", host)


def is_loopback(host: str) -> bool:
    """Whether `host`, with or without a port, is this machine by name or address."""
    name = urlsplit(f"//{host}").hostname or ""
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
