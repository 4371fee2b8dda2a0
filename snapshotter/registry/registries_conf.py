"""podman's and CRI-O's registries.conf on disk, with its drop-ins, and the hosts that it names."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import TYPE_CHECKING

import trio

from snapshotter.registry import tls
from snapshotter.registry.endpoint import Endpoint, endpoint_of, is_loopback
from snapshotter.registry.errors import HostsError
from snapshotter.registry.host import EVERYTHING, Capability, Host, account_of
from snapshotter.registry.hosts import TlsFiles
from snapshotter.registry.registries import (
    Place,
    Rule,
    parse_auth_helper,
    parse_registries,
    rule_for,
)

if TYPE_CHECKING:
    from pathlib import Path

    from snapshotter.registry.reference import Reference

_Versions = dict["Path", tuple[int, int, int]]  # inode, size, mtime in ns


class RegistriesConf:
    """Knows the hosts of an image. A change on disk counts from the next lookup on."""

    def __init__(self, path: Path) -> None:
        """`path` need not exist. Files `*.conf` in the directory `path` + `.d` are read after it,
        by name."""
        self._path = path
        self._versions: _Versions | None = None
        self._rules: tuple[Rule, ...] = ()
        self._lock = threading.Lock()

    async def lookup(
        self, reference: Reference, *, plain_http: bool | None = None
    ) -> tuple[Host, ...] | None:
        """The hosts to ask for an image, in order; None if nothing is said about it.

        `plain_http` decides the scheme of the registry that the reference names. Raises HostsError.
        """
        rules = await trio.to_thread.run_sync(self._load)
        rule = rule_for(rules, reference)
        if rule is None:
            return None
        if rule.blocked:
            raise HostsError(
                f"{reference.name} is blocked", hint=f"{self._path} says so, for {rule.prefix}"
            )
        location = rule.location or Place(reference.registry, insecure=rule.insecure)
        hosts: list[Host] = []
        for mirror in rule.mirrors:
            if mirror.by_tag or mirror.by_digest:
                hosts += _hosts(mirror, rule.repository_at(mirror, reference), reference, None)
        hosts += _hosts(location, rule.repository_at(location, reference), reference, plain_http)
        return tuple(hosts)

    def auth_helper(self) -> str:
        """The program that hands credentials to layer stores, or "" if none is named. Blocks.
        Raises HostsError."""
        named = ""
        try:
            for path in self._stat():
                named = parse_auth_helper(path.read_bytes(), path) or named
        except OSError as error:
            raise _unreadable(error, self._path) from error
        return named

    def _load(self) -> tuple[Rule, ...]:
        """All rules, read again only if a file changed, came or went."""
        with self._lock:
            try:
                versions = self._stat()
                if versions != self._versions:
                    self._rules = tuple(
                        rule
                        for path in versions
                        for rule in parse_registries(path.read_bytes(), path)
                    )
                    self._versions = versions
            except OSError as error:
                raise _unreadable(error, self._path) from error
            return self._rules

    def _stat(self) -> _Versions:
        found: _Versions = {}
        drop_ins = self._path.with_name(f"{self._path.name}.d")
        for path in (self._path, *sorted(drop_ins.glob("*.conf"))):
            try:
                status = path.stat()
            except (FileNotFoundError, NotADirectoryError):
                continue
            found[path] = (status.st_ino, status.st_size, status.st_mtime_ns)
        return found


def _hosts(
    place: Place, repository: str, reference: Reference, plain_http: bool | None
) -> list[Host]:
    """A place as hosts. One that is insecure is tried with TLS, whoever vouches for it, and then
    without, as podman does; on loopback the custom is HTTP."""
    endpoint = endpoint_of(
        place.host, plain_http=plain_http if place.host == reference.registry else None
    )
    host = Host(
        endpoint,
        account_of(endpoint.host),
        repository="" if repository == reference.repository else repository,
        capabilities=_capabilities(place, reference),
    )
    if not place.insecure or endpoint.scheme == "http" or is_loopback(place.host):
        return [host]
    unverified = replace(host, tls=tls.load(TlsFiles(skip_verify=True)))
    plain = replace(host, endpoint=Endpoint("http", endpoint.host, endpoint.path))
    return [unverified, plain]


def _capabilities(place: Place, reference: Reference) -> Capability:
    """A mirror for digests alone is not asked what a tag is; what the tag names it may bring."""
    if place.by_tag and (place.by_digest or reference.digest is None):
        return EVERYTHING
    return Capability.PULL if place.by_digest else Capability(0)


def _unreadable(error: OSError, path: Path) -> HostsError:
    return HostsError(f"cannot read {error.filename or path} ({error.strerror})")
