"""A registries.conf as values: which hosts have the images of a registry, or of a part of it.

Source: containers-registries.conf(5), version 2. No files, no sockets. Unknown keys are ignored, as
there; short names, sorting and credential helpers are podman's business.
"""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from snapshotter.registry.errors import HostsError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from snapshotter.registry.reference import Reference

_PLACE = re.compile(
    r"(?P<host>[A-Za-z0-9._-]+(?::[0-9]{1,5})?|\[[0-9a-f:.]+\](?::[0-9]{1,5})?)(?P<path>(?:/[a-z0-9._-]+)*)"
)
_MODES = ("all", "digest-only", "tag-only")


@dataclass(frozen=True, slots=True)
class Place:
    """Where images are: a host, with its port if it has one, and the path that takes the place of
    the prefix's there. `insecure` allows HTTP and certificates that nobody vouches for. `by_tag`
    and `by_digest` say which references may be looked for there.
    """

    host: str
    path: str = ""
    insecure: bool = False
    by_tag: bool = True
    by_digest: bool = True


@dataclass(frozen=True, slots=True)
class Rule:
    """One `[[registry]]`. `prefix` is a host and perhaps a path, or `*.` and a domain.

    `location` None is the registry that the reference names.
    """

    prefix: str
    location: Place | None
    mirrors: tuple[Place, ...]
    insecure: bool = False
    blocked: bool = False

    def covers(self, reference: Reference) -> bool:
        """Whether this is about an image."""
        if self.prefix.startswith("*."):
            return reference.registry.partition(":")[0].endswith(self.prefix[1:])
        return f"{reference.name}/".startswith(f"{self.prefix}/")

    def repository_at(self, place: Place, reference: Reference) -> str:
        """What a covered image's repository is called at one of the rule's places."""
        rest = reference.repository
        if not self.prefix.startswith("*."):
            rest = reference.name[len(self.prefix) :].lstrip("/")
        return "/".join(part for part in (place.path, rest) if part)


def parse_registries(raw: bytes, path: Path) -> tuple[Rule, ...]:
    """Read the file that lies at `path`. Raises HostsError."""
    document = _document(raw, path)
    tables = document.get("registry", [])
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise HostsError(f"{path}: registry is not a list of tables, as in [[registry]]")
    return tuple(
        _rule(table, f"{path}, registry {number}") for number, table in enumerate(tables, 1)
    )


def parse_auth_helper(raw: bytes, path: Path) -> str:
    """The program that the file at `path` names for handing credentials to layer stores, or "".

    Raises HostsError. Source: containers-registries.conf(5), `additional-layer-store-auth-helper`.
    """
    return _text(_document(raw, path), "additional-layer-store-auth-helper", str(path))


def rule_for(rules: Iterable[Rule], reference: Reference) -> Rule | None:
    """The rule with the longest prefix that covers an image; of equal ones the last."""
    best = None
    for rule in rules:
        if rule.covers(reference) and (best is None or len(rule.prefix) >= len(best.prefix)):
            best = rule
    return best


def _document(raw: bytes, path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(raw.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise HostsError(f"{path} is not valid TOML ({error})") from error


def _rule(table: dict[str, Any], where: str) -> Rule:
    prefix = _text(table, "prefix", where)
    location = _text(table, "location", where)
    if not prefix and not location:
        raise HostsError(f"{where}: neither prefix nor location")
    if not location and not prefix.startswith("*."):
        location = prefix
    prefix = prefix or location
    if not _PLACE.fullmatch(prefix.removeprefix("*.")):
        raise HostsError(f"{where}: prefix {prefix!r} is no host[:port][/path], or *.domain")
    insecure = _flag(table, "insecure", where)
    by_digest_only = _flag(table, "mirror-by-digest-only", where)
    mirrors = table.get("mirror", [])
    if not isinstance(mirrors, list) or not all(isinstance(mirror, dict) for mirror in mirrors):
        raise HostsError(f"{where}: mirror is not a list of tables, as in [[registry.mirror]]")
    return Rule(
        prefix,
        _place(location, insecure, "all", where) if location else None,
        tuple(_mirror(mirror, by_digest_only, f"{where}, mirror") for mirror in mirrors),
        insecure=insecure,
        blocked=_flag(table, "blocked", where),
    )


def _mirror(table: dict[str, Any], by_digest_only: bool, where: str) -> Place:
    mode = _text(table, "pull-from-mirror", where) or ("digest-only" if by_digest_only else "all")
    if mode not in _MODES:
        raise HostsError(
            f"{where}: pull-from-mirror is {mode!r}, and not one of {', '.join(_MODES)}"
        )
    return _place(_text(table, "location", where), _flag(table, "insecure", where), mode, where)


def _place(text: str, insecure: bool, mode: str, where: str) -> Place:
    found = _PLACE.fullmatch(text)
    if not found:
        raise HostsError(f"{where}: location {text!r} is no host[:port][/path]")
    return Place(
        found["host"].lower(),
        found["path"].lstrip("/"),
        insecure,
        by_tag=mode != "digest-only",
        by_digest=mode != "tag-only",
    )


def _text(table: dict[str, Any], key: str, where: str) -> str:
    value = table.get(key, "")
    if not isinstance(value, str):
        raise HostsError(f"{where}: {key} is not a string")
    return value.rstrip("/")


def _flag(table: dict[str, Any], key: str, where: str) -> bool:
    value = table.get(key, False)
    if not isinstance(value, bool):
        raise HostsError(f"{where}: {key} is neither true nor false")
    return value
