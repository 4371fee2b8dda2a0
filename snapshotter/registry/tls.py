"""TLS contexts from certificates on disk. Blocking: for worker threads."""

from __future__ import annotations

import os
import ssl
from typing import TYPE_CHECKING

from snapshotter.registry.errors import HostsError
from snapshotter.registry.host import TlsContexts

if TYPE_CHECKING:
    from pathlib import Path

    from snapshotter.registry.hosts import TlsFiles


def load(files: TlsFiles) -> TlsContexts:
    """Contexts that trust the system's CAs and those in `files`. Raises HostsError."""
    own = _context(files)
    if not files.client:
        return TlsContexts(own, own)
    # OpenSSL holds one certificate of each key type, the last: so the first of each is used.
    for certificate, key in reversed(files.client):
        _load_client(own, certificate, key)
    return TlsContexts(own, _context(files))


def _context(files: TlsFiles) -> ssl.SSLContext:
    if files.skip_verify:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    else:
        context = ssl.create_default_context()
    for path in files.ca:
        try:
            context.load_verify_locations(cafile=path)
        except OSError as error:
            raise _error("CA certificate", path, error) from error
    return context


def _load_client(context: ssl.SSLContext, certificate: Path, key: Path | None) -> None:
    for path in (certificate, key):  # OpenSSL does not say which of the two it could not read
        try:
            if path is not None:
                os.close(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
        except OSError as error:
            raise _error("client certificate", path or certificate, error) from error
    try:
        # An encrypted key would be asked a password for on the terminal.
        context.load_cert_chain(certificate, key, password="")
    except OSError as error:
        raise _error("client certificate", certificate, error) from error


def _error(what: str, path: Path, error: OSError) -> HostsError:
    """SSLError is an OSError, too, but of OpenSSL's numbers."""
    if isinstance(error, ssl.SSLError) or error.errno is None:
        why = getattr(error, "reason", None) or "not in PEM form"
    else:
        why = os.strerror(error.errno)
    return HostsError(f"cannot use the {what} {path} ({why})")
