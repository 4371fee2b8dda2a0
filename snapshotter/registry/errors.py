"""What a registry, or the way to it, can do wrong.

Statuses and network failures are converted to these in one place each (`session`, `transport`);
`transient` is what the retry policy goes by.
"""

from __future__ import annotations

from index.errors import FirstByteError


class RegistryError(FirstByteError):
    """The root of this room. `transient`: the same request may succeed a little later."""

    transient = False


class InvalidReferenceError(RegistryError):
    """An image name, tag, digest or platform that cannot mean anything."""


class CredentialsError(RegistryError):
    """Credentials are configured but cannot be read."""


class HostsError(RegistryError):
    """What is configured about a registry's hosts (hosts.toml) is malformed or cannot be read."""


class LayoutError(RegistryError):
    """An OCI layout directory cannot be read or written."""


class NotFoundError(RegistryError):
    """The image, tag, manifest or blob does not exist (404)."""


class UnauthorizedError(RegistryError):
    """The registry wants to know who asks, and our answer, if any, did not do (401)."""


class ForbiddenError(RegistryError):
    """The registry knows who asks and refuses (403)."""


class RateLimitedError(RegistryError):
    """Too many requests (429). `retry_after` is in seconds, if the registry said so."""

    transient = True

    def __init__(self, message: str, *, retry_after: float | None = None, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.retry_after = retry_after


class ServerError(RegistryError):
    """The registry failed (5xx, 408). `retry_after` as for `RateLimitedError`."""

    transient = True

    def __init__(self, message: str, *, retry_after: float | None = None, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.retry_after = retry_after


class NetworkError(RegistryError):
    """No connection, a reset, a timeout, or a body that ended too early."""

    transient = True


class TlsError(NetworkError):
    """The registry's certificate or TLS version is not acceptable; asking again will not help."""

    transient = False


class ProxyError(NetworkError):
    """The way leads through a proxy that cannot be used, or that refuses (403, 407)."""

    transient = False


class ProtocolError(RegistryError):
    """An answer that makes no sense: it breaks HTTP, the distribution or the image spec."""
