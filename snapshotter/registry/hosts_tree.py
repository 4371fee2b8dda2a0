"""The tree of hosts.toml files, as containerd keeps one in `/etc/containerd/certs.d`.

Source: containerd's `core/remotes/docker/config/hosts.go` and `config_unix.go`.
"""

from __future__ import annotations

import logging
import os
import threading
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import trio

from snapshotter.registry import tls
from snapshotter.registry.endpoint import endpoint_of
from snapshotter.registry.errors import HostsError
from snapshotter.registry.host import Host, TlsContexts, account_of, is_mirror, registry_host
from snapshotter.registry.hosts import HostEntry, HostsFile, from_certificates, parse_hosts

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from snapshotter.registry.reference import Reference
    from snapshotter.registry.registries_conf import RegistriesConf

log = logging.getLogger(__name__)

_DEFAULT_DIRECTORY = "_default"
_FILE = "hosts.toml"

_Version = tuple[int, int, int] | None  # inode, size, mtime in ns; None: not there


@dataclass(frozen=True, slots=True)
class _Loaded:
    """What a directory says, and the versions of the files that say it."""

    versions: dict[Path, _Version]
    hosts: tuple[tuple[HostEntry, TlsContexts | None], ...]


class HostsTree:
    """Knows the hosts of every registry. A change on disk counts from the next lookup on.

    Keeps what it has read, for each directory of the tree that was ever used.
    """

    def __init__(self, path: Path, registries: RegistriesConf | None = None) -> None:
        """`path` need not exist: then no registry has hosts of its own. What the tree says nothing
        about may be in `registries`."""
        self._root = path
        self._registries = registries
        self._loaded: dict[Path, _Loaded] = {}
        self._lock = threading.Lock()

    async def lookup(
        self, reference: Reference, *, plain_http: bool | None = None
    ) -> tuple[Host, ...]:
        """The hosts to ask for an image, in order; the last is its registry's server.

        `plain_http` decides the server's scheme, if that is the registry itself; None leaves it to
        the file, or to the custom that `endpoint_of` follows. Raises HostsError if what is said
        about this registry cannot be read or makes no sense.
        """
        registry = reference.registry
        found = await trio.to_thread.run_sync(self._find, registry)
        if found is None:
            if self._registries is not None:
                named = await self._registries.lookup(reference, plain_http=plain_http)
                if named is not None:
                    return named
            return (registry_host(registry, plain_http=plain_http),)
        *mirrors, (server, server_tls) = found
        return (
            *(_host(entry, contexts, registry) for entry, contexts in mirrors),
            _host(server, server_tls, registry, plain_http=plain_http),
        )

    def _find(self, registry: str) -> tuple[tuple[HostEntry, TlsContexts | None], ...] | None:
        for name in directory_names(registry):
            directory = self._root / name
            if _version(directory) is not None:
                with self._lock:
                    return self._load(directory).hosts
        return None

    def _load(self, directory: Path) -> _Loaded:
        """What `directory` says, read again only if one of its files changed."""
        known = self._loaded.get(directory)
        if known is not None and known.versions == _versions(known.versions):
            return known
        # Versions are taken before the files are read: what changes meanwhile is read once more.
        versions = _versions((directory, directory / _FILE))
        read = _read(directory)
        for entry in read.hosts:
            versions |= _versions(entry.tls.paths if entry.tls else ())
        loaded = _Loaded(
            versions,
            tuple((entry, tls.load(entry.tls) if entry.tls else None) for entry in read.hosts),
        )
        for warning in read.warnings:
            log.warning("%s", warning)
        self._loaded[directory] = loaded
        return loaded


def directory_names(registry: str) -> list[str]:
    """Where a registry's hosts may be described, the first that exists alone counting."""
    name, colon, port = registry.rpartition(":")
    with_port = [f"{name}_{port}_"] if colon and name else []
    return [*with_port, registry, _DEFAULT_DIRECTORY]


def _read(directory: Path) -> HostsFile:
    path = directory / _FILE
    try:
        try:
            raw = path.read_bytes()
        except FileNotFoundError:
            raw = b""
        if raw:
            return parse_hosts(raw, path)
        with os.scandir(directory) as entries:
            return from_certificates(directory, {one.name for one in entries if not one.is_dir()})
    except OSError as error:
        raise HostsError(f"cannot read {error.filename or path} ({error.strerror})") from error


def _host(
    entry: HostEntry,
    contexts: TlsContexts | None,
    registry: str,
    *,
    plain_http: bool | None = None,
) -> Host:
    endpoint = entry.endpoint
    if endpoint is None:
        # TLS settings for a loopback registry mean that it has TLS, against the custom
        plain = False if plain_http is None and contexts is not None else plain_http
        endpoint = endpoint_of(registry, plain_http=plain)
    mirror = is_mirror(endpoint.host, registry)
    if plain_http is not None and not mirror:
        endpoint = replace(endpoint, scheme="http" if plain_http else "https")
    return Host(
        endpoint,
        account_of(endpoint.host),
        namespace=registry if mirror else "",
        capabilities=entry.capabilities,
        headers=entry.headers,
        tls=contexts,
        dial_timeout=entry.dial_timeout,
    )


def _versions(paths: Iterable[Path]) -> dict[Path, _Version]:
    return {path: _version(path) for path in paths}


def _version(path: Path) -> _Version:
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise HostsError(f"cannot read {path} ({error.strerror})") from error
    return status.st_ino, status.st_size, status.st_mtime_ns
