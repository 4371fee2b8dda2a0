"""Why there is no connection: what the system and TLS say, as one line and what to do about it."""

from __future__ import annotations

import os
import socket
import ssl
from typing import TYPE_CHECKING

from snapshotter.registry.errors import NetworkError, ProxyError, TlsError
from snapshotter.registry.status import PROXY_LOGIN

if TYPE_CHECKING:
    from collections.abc import Iterator


def network_error(host: str, error: Exception) -> NetworkError:
    """The error for a failed exchange with `host`.

    The cause is deep in a chain: HTTP libraries wrap errors without their text.
    """
    for cause in _causes(error):
        if isinstance(cause, ssl.SSLCertVerificationError):
            return TlsError(
                f"the certificate of {host} is not valid ({cause.verify_message})",
                hint="name its CA in hosts.toml or install it on this machine, "
                "or use --plain-http if it has no TLS",
            )
        if isinstance(cause, ssl.SSLError):
            return TlsError(
                f"no TLS with {host} ({cause.reason or cause})",
                hint="if the registry speaks plain HTTP, use --plain-http",
            )
        if isinstance(cause, socket.gaierror):
            return NetworkError(f"cannot find {host} ({cause.strerror})", hint="is the name right?")
        if isinstance(cause, OSError) and cause.errno:
            return NetworkError(
                f"connection to {host} failed ({os.strerror(cause.errno)})",
                hint="is the registry running, and reachable from here?",
            )
    return NetworkError(f"connection to {host} failed ({error or type(error).__name__})")


def tunnel_error(server: str, answer: str) -> NetworkError:
    """The error for a proxy's `answer` to CONNECT, which is not 200: status and reason."""
    status = answer[:3]
    if status == "407":
        return ProxyError(f"{server}: the proxy wants to know who asks", hint=PROXY_LOGIN)
    if status.startswith("4") and status not in ("408", "429"):
        return ProxyError(
            f"{server}: the proxy refuses ({answer.strip()})",
            hint="is the registry meant to be in NO_PROXY?",
        )
    return NetworkError(f"{server}: the proxy does not get through ({answer.strip()})")


def _causes(error: BaseException) -> Iterator[BaseException]:
    """`error` and what caused it, the deepest first."""
    nested = error.exceptions if isinstance(error, BaseExceptionGroup) else ()
    for cause in (*nested, error.__cause__, error.__context__):
        if cause is not None:
            yield from _causes(cause)
    yield error
