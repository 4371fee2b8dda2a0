"""A hosts.toml, or the certificates in its place, as values. No files, no sockets.

Source: containerd's `docs/hosts.md` and `core/remotes/docker/config/hosts.go`. As there, unknown
keys are ignored. Unlike there, a file that cannot be understood is an error, not a reason to go
past the mirrors it names; and a host written as `http://` is spoken to without TLS, even if there
are TLS settings.
"""

from __future__ import annotations

import posixpath
import re
import tomllib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

from snapshotter.registry.endpoint import DEFAULT_REGISTRY_HOST, Endpoint
from snapshotter.registry.errors import HostsError
from snapshotter.registry.host import EVERYTHING, Capability
from snapshotter.registry.reference import DEFAULT_REGISTRY

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from pathlib import Path

_KEYS = frozenset(
    ("capabilities", "ca", "client", "skip_verify", "header", "override_path", "dial_timeout")
)
_CAPABILITIES = {
    "pull": Capability.PULL,
    "resolve": Capability.RESOLVE,
    "push": Capability.PUSH,
    "referrers": Capability.REFERRERS,
}
_HOST = re.compile(r"(?:[a-z0-9._-]+|\[[0-9a-f:.]+\])(?::[0-9]{1,5})?")
_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # RFC 9110, token
_HEADER_VALUE = re.compile(r"[\x20-\x7e\t]*")
_OUR_HEADERS = frozenset(
    (
        "accept-encoding",
        "connection",
        "content-length",
        "host",
        "range",
        "trailer",
        "transfer-encoding",
    )
)
_DURATION = re.compile(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)(ns|us|µs|μs|ms|s|m|h)")
_SECONDS = {
    "ns": 1e-9, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """What TLS with a host is based on, besides what the system trusts.

    `client` are pairs of certificate and key; None is a key in the certificate's file.
    """

    ca: tuple[Path, ...] = ()
    client: tuple[tuple[Path, Path | None], ...] = ()
    skip_verify: bool = False

    @property
    def paths(self) -> tuple[Path, ...]:
        """All files."""
        return self.ca + tuple(path for pair in self.client for path in pair if path is not None)


@dataclass(frozen=True, slots=True)
class HostEntry:
    """One host as it is written down. `endpoint` None is the registry itself; `tls` None says
    nothing about TLS; `dial_timeout` is in seconds."""

    endpoint: Endpoint | None = None
    capabilities: Capability = EVERYTHING
    headers: tuple[tuple[str, str], ...] = ()
    tls: TlsFiles | None = None
    dial_timeout: float | None = None


@dataclass(frozen=True, slots=True)
class HostsFile:
    """All hosts for a registry, in the order to ask them, the registry's server last.

    `warnings` are lines about what is there but has no effect.
    """

    hosts: tuple[HostEntry, ...]
    warnings: tuple[str, ...] = ()


def parse_hosts(raw: bytes, path: Path) -> HostsFile:
    """Read the hosts.toml that lies at `path`. Raises HostsError."""
    try:
        document = tomllib.loads(raw.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise HostsError(f"{path} is not valid TOML ({error})") from error
    warnings: list[str] = []
    tables = document.pop("host", {})
    if not isinstance(tables, dict):
        raise HostsError(f'{path}: host is not a table, as in [host."https://mirror.example"]')
    hosts = []
    for url, table in tables.items():
        where = f"{path}, host {url}"
        if not isinstance(table, dict):
            raise HostsError(f"{where}: not a table")
        hosts.append(_Table(table, path.parent, where, warnings).entry(url))
    server = document.pop("server", "")
    if not isinstance(server, str):
        raise HostsError(f"{path}: server is not a string")
    hosts.append(_Table(document, path.parent, str(path), warnings).entry(server))
    return HostsFile(tuple(hosts), tuple(warnings))


def from_certificates(directory: Path, names: Collection[str]) -> HostsFile:
    """What docker's layout says, which has no hosts.toml but certificates by their names: `*.crt`
    for CAs, `*.cert` with `*.key` for clients. `names` are the files in `directory`."""
    ca = tuple(directory / name for name in sorted(names) if name.endswith(".crt"))
    client = []
    for name in sorted(names):
        if name.endswith(".cert"):
            key = f"{name.removesuffix('.cert')}.key"
            client.append((directory / name, directory / key if key in names else None))
    tls = TlsFiles(ca, tuple(client)) if ca or client else None
    return HostsFile((HostEntry(tls=tls),))


class _Table:
    """The keys of one host. `where` starts every complaint about them."""

    def __init__(
        self, table: Mapping[str, Any], directory: Path, where: str, warnings: list[str]
    ) -> None:
        self._table = table
        self._directory = directory
        self._where = where
        self._warnings = warnings

    def entry(self, url: str) -> HostEntry:
        """The host at `url`; empty is the registry itself."""
        for key in self._table.keys() - _KEYS:
            self._warn(f"{key} is not known here, and ignored")
        tls = self._tls()
        endpoint = self._endpoint(url, override_path=self._flag("override_path")) if url else None
        if endpoint is not None and endpoint.scheme == "http" and tls is not None:
            self._warn("TLS is configured, but http:// is spoken to without it")
        return HostEntry(
            endpoint=endpoint,
            # containerd, too, takes no notice of capabilities without a server
            capabilities=self._capabilities() if url else EVERYTHING,
            headers=self._headers(),
            tls=tls,
            dial_timeout=self._dial_timeout(),
        )

    def _endpoint(self, url: str, *, override_path: bool) -> Endpoint:
        text = url if "://" in url else f"https://{url}"
        try:
            parts = urlsplit(text)
            port_fits = parts.port != 0
        except ValueError:
            raise self._error(f"{url!r} is not a URL") from None
        userinfo, _, host = parts.netloc.lower().rpartition("@")
        if parts.scheme not in ("http", "https") or not port_fits or not _HOST.fullmatch(host):
            raise self._error(f"{url!r} is not an http or https URL")
        if userinfo or parts.query or parts.fragment:
            self._warn("only scheme, host and path of the URL are used")
        path = posixpath.normpath(f"/{parts.path}").lstrip("/")
        path = f"/{quote(path, safe='/%:@!$&+,;=~')}" if path else ""
        if not override_path and not path.endswith("/v2"):
            path += "/v2"
        # Documented by containerd itself as docker.io's server; what answers there is a web site.
        return Endpoint(
            parts.scheme, DEFAULT_REGISTRY_HOST if host == DEFAULT_REGISTRY else host, path
        )

    def _capabilities(self) -> Capability:
        found = Capability(0)
        names = self._table.get("capabilities", [])
        if not isinstance(names, list):
            raise self._error("capabilities is not a list")
        for name in names:
            known = _CAPABILITIES.get(name.lower()) if isinstance(name, str) else None
            if known is None:
                raise self._error(f"unknown capability {name!r}")
            found |= known
        return found or EVERYTHING

    def _tls(self) -> TlsFiles | None:
        if not self._table.keys() & {"ca", "client", "skip_verify"}:
            return None
        return TlsFiles(self._ca(), self._client(), self._flag("skip_verify"))

    def _ca(self) -> tuple[Path, ...]:
        value = self._table.get("ca", [])
        paths = [value] if isinstance(value, str) else value
        if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
            raise self._error("ca is not a file or a list of files")
        return tuple(self._path(path) for path in paths)

    def _client(self) -> tuple[tuple[Path, Path | None], ...]:
        value = self._table.get("client", [])
        pairs: list[tuple[Path, Path | None]] = []
        items = [value] if isinstance(value, str) else value
        for item in items if isinstance(items, list) else [items]:
            match item:
                case str(certificate):
                    pairs.append((self._path(certificate), None))
                case [str(certificate), str(key)]:
                    pairs.append((self._path(certificate), self._path(key) if key else None))
                case _:
                    raise self._error("client is not a file, a list of files or of pairs of files")
        return tuple(pairs)

    def _path(self, text: str) -> Path:
        if not text or "\0" in text:
            raise self._error(f"{text!r} is not a file")
        return self._directory / text

    def _headers(self) -> tuple[tuple[str, str], ...]:
        table = self._table.get("header", {})
        if not isinstance(table, dict):
            raise self._error("header is not a table")
        found = []
        for name, value in table.items():
            values = value if isinstance(value, list) else [value]
            if not _HEADER_NAME.fullmatch(name):
                raise self._error(f"malformed header name {name!r}")
            if name.lower() in _OUR_HEADERS:
                self._warn(f"header {name} cannot be set")
                continue
            for one in values:
                if not isinstance(one, str) or not _HEADER_VALUE.fullmatch(one):
                    raise self._error(f"malformed value of header {name}")
                found.append((name, one.strip()))
        return tuple(found)

    def _dial_timeout(self) -> float | None:
        text = self._table.get("dial_timeout", "")
        if text == "":
            return None
        seconds = parse_duration(text) if isinstance(text, str) else None
        if seconds is None:
            raise self._error(f"dial_timeout {text!r} is not a duration, such as 500ms or 3s")
        return seconds or None  # 0 is no limit of its own, as in Go

    def _flag(self, key: str) -> bool:
        value = self._table.get(key, False)
        if not isinstance(value, bool):
            raise self._error(f"{key} is neither true nor false")
        return value

    def _warn(self, problem: str) -> None:
        self._warnings.append(f"{self._where}: {problem}")

    def _error(self, problem: str) -> HostsError:
        return HostsError(f"{self._where}: {problem}")


def parse_duration(text: str) -> float | None:
    """Seconds of a duration as Go writes it (`time.ParseDuration`); None if none, or negative."""
    body = text.removeprefix("+")
    if body == "0":
        return 0.0
    if not re.fullmatch(f"(?:{_DURATION.pattern})+", body):
        return None
    return sum(float(number) * _SECONDS[unit] for number, unit in _DURATION.findall(body))
