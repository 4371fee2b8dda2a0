"""Image references, as people type them.

Grammar: distribution's `reference` package, "Grammar", with docker's short names: `python` is
`docker.io/library/python:latest`. Unlike docker, an upper-case first component is never taken for
a host.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from snapshotter.registry.digests import check_digest
from snapshotter.registry.errors import InvalidReferenceError, ProtocolError

DEFAULT_REGISTRY = "docker.io"
DEFAULT_TAG = "latest"

LAYOUT_PREFIX = "oci:"
"""What tells an image in an OCI layout from a reference."""

_PORTS = range(1, 65536)
_MAX_NAME = 255  # registry and repository together; the same source as the grammar
_COMPONENT = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_REPOSITORY = re.compile(rf"{_COMPONENT}(?:/{_COMPONENT})*")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_LABEL = r"(?:[a-z0-9]|[a-z0-9][a-z0-9-]*[a-z0-9])"
_REGISTRY = re.compile(rf"(?:{_LABEL}(?:\.{_LABEL})*|\[[0-9a-f:.]+\])(?::(?P<port>[0-9]{{1,5}}))?")
_IMAGE_ID = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Reference:
    """One image's name: where it is, what it is called there, and which of it.

    `registry` is a host name with an optional port, in lower case. At least one of `tag` and
    `digest` is set; with both, the digest decides and the tag is for people.
    """

    registry: str
    repository: str
    tag: str | None
    digest: str | None

    @classmethod
    def parse(cls, text: str) -> Reference:
        """Read a reference.

        Raises InvalidReferenceError, or UnsupportedError for digests other than sha256.
        """
        if "://" in text:
            raise _invalid(text, "has a scheme", "leave out everything up to and including '://'")
        name, at, digest_text = text.partition("@")
        digest = _digest(text, digest_text) if at else None
        name, tag = _split_tag(name)
        if tag is not None and not _TAG.fullmatch(tag):
            raise _invalid(
                text, f"has the malformed tag {tag!r}", "letters, digits, '_', '.', '-'; <= 128"
            )
        registry, repository = _split_registry(name)
        _check_repository(text, repository)
        if not (match := _REGISTRY.fullmatch(registry)) or int(match["port"] or 1) not in _PORTS:
            raise _invalid(
                text, f"has the malformed registry host {registry!r}", "host[:port]/name"
            )
        if len(registry) + 1 + len(repository) > _MAX_NAME:
            raise _invalid(text, "is too long", f"at most {_MAX_NAME} characters before the tag")
        if tag is None and digest is None:
            tag = DEFAULT_TAG
        return cls(registry, repository, tag, digest)

    def __str__(self) -> str:
        tag = f":{self.tag}" if self.tag is not None else ""
        digest = f"@{self.digest}" if self.digest is not None else ""
        return f"{self.name}{tag}{digest}"

    @property
    def name(self) -> str:
        """Registry and repository, without tag and digest."""
        return f"{self.registry}/{self.repository}"

    @property
    def selector(self) -> str:
        """What names the manifest in the registry's API: the digest if there is one, or the tag."""
        selector = self.digest or self.tag
        assert selector is not None
        return selector


def _invalid(text: str, problem: str, hint: str) -> InvalidReferenceError:
    return InvalidReferenceError(f"image reference {text[:300]!r} {problem}", hint=hint)


def _digest(text: str, digest: str) -> str:
    try:
        return check_digest(digest)
    except ProtocolError:
        hint = "sha256: and 64 hexadecimal digits in lower case"
        raise _invalid(text, f"has the malformed digest {digest[:80]!r}", hint) from None


def _split_tag(name: str) -> tuple[str, str | None]:
    """A colon after the last slash starts a tag; one before it is a registry's port."""
    head, colon, tag = name.rpartition(":")
    if colon and "/" not in tag:
        return head, tag
    return name, None


def _split_registry(name: str) -> tuple[str, str]:
    first, slash, rest = name.partition("/")
    if slash and ("." in first or ":" in first or first.lower() == "localhost"):
        registry, repository = first.lower(), rest
    else:
        registry, repository = DEFAULT_REGISTRY, name
    if registry in ("index.docker.io", "registry-1.docker.io"):
        registry = DEFAULT_REGISTRY
    if registry == DEFAULT_REGISTRY and repository and "/" not in repository:
        repository = f"library/{repository}"
    return registry, repository


def _check_repository(text: str, repository: str) -> None:
    if not repository:
        raise _invalid(text, "has no repository name", "for example python:3.12")
    if _REPOSITORY.fullmatch(repository):
        if _IMAGE_ID.fullmatch(repository.removeprefix("library/")):
            raise _invalid(text, "is an image's ID, not a name", "use the name it was pulled by")
        return
    if _REPOSITORY.fullmatch(repository.lower()):
        lower = repository.lower().removeprefix("library/")
        raise _invalid(text, "has upper-case letters", f"repository names are lower case: {lower}")
    raise _invalid(
        text,
        f"has the malformed repository name {repository[:200]!r}",
        "lower-case letters and digits, separated by '.', '_', '__', '-' or '/'",
    )
