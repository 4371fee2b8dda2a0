"""Artifacts that point at an image: the referrers API, or the tag that stands in for it.

Source: OCI distribution spec 1.1, "Listing Referrers" and "Unavailable Referrers API".
"""

from __future__ import annotations

import re
from contextlib import suppress
from typing import TYPE_CHECKING
from urllib.parse import urlencode, urljoin

from index.errors import FirstByteError
from snapshotter.nursery import open_nursery
from snapshotter.registry.errors import NotFoundError, ProtocolError
from snapshotter.registry.manifest import (
    MAX_MANIFEST,
    OCI_PLATFORM_LIST,
    PlatformList,
    parse,
    too_large,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from snapshotter.registry.manifest import Descriptor
    from snapshotter.registry.session import Session

_MAX_PAGES = 32  # guess: far more artifacts than an image has; ends a list that goes in circles
_NEXT = re.compile(r"<([^>]*)>\s*;(?:[^,]*;)?\s*rel\s*=\s*\"?next\"?", re.IGNORECASE)


def fallback_tag(digest: str) -> str:
    """The tag under which referrers of `digest` are listed where the API is missing."""
    return digest.replace(":", "-")


def of_type(entries: Iterable[Descriptor], artifact_type: str) -> list[Descriptor]:
    """Those of one artifact type; servers need not filter."""
    return [entry for entry in entries if entry.artifact_type == artifact_type]


def merged(entries: Sequence[Descriptor], new: Descriptor) -> list[Descriptor]:
    """A list of referrers with `new` in it once, in the place of an entry for the same digest."""
    if any(entry.digest == new.digest for entry in entries):
        return [new if entry.digest == new.digest else entry for entry in entries]
    return [*entries, new]


def next_page(link: str | None) -> str | None:
    """The target of a Link header that leads to the next page, if one does (RFC 8288)."""
    match = _NEXT.search(link or "")
    return match[1] if match else None


async def find(session: Session, digest: str, artifact_type: str) -> list[Descriptor]:
    """The referrers of `digest` with one artifact type: from the API, or else the fallback tag.

    Whether a host has the API is remembered for a while. Until that is known, both are asked for at
    the same time, which saves who lacks it a round trip.
    """
    target = f"referrers/{digest}?{urlencode({'artifactType': artifact_type})}"
    there = session.has_referrers
    if there is None:
        return of_type(await _from_either(session, target, digest), artifact_type)
    found = await _try_api(session, target, digest) if there else None
    if found is None:
        found = await from_fallback_tag(session, digest)
    return of_type(found, artifact_type)


async def _from_either(session: Session, target: str, digest: str) -> list[Descriptor]:
    """From the API, if the host has it, else the fallback tag. Both are on their way at once."""
    tagged: list[Descriptor] = []
    failure: FirstByteError | None = None

    async def ask_for_tag() -> None:
        nonlocal tagged, failure
        try:
            tagged = await from_fallback_tag(session, digest)
        except FirstByteError as error:
            failure = error

    async with open_nursery() as nursery:
        nursery.start_soon(ask_for_tag)
        found = await _try_api(session, target, digest)
        if found is not None:
            nursery.cancel_scope.cancel()
            return found
    if failure is not None:
        raise failure
    return tagged


async def _try_api(session: Session, target: str, digest: str) -> list[Descriptor] | None:
    """None if the host lacks the API."""
    found = None
    with suppress(NotFoundError, ProtocolError):  # 400 and 405 are also said by who lacks it
        found = await _from_api(session, target, digest)
    session.note_referrers(there=found is not None)
    return found


async def from_fallback_tag(session: Session, digest: str) -> list[Descriptor]:
    """All referrers that the fallback tag lists; none if there is no such tag."""
    what = f"the referrers of {session.reference.name}@{digest}"
    try:
        response = await session.open(
            "GET",
            f"manifests/{fallback_tag(digest)}",
            what=what,
            headers={"Accept": OCI_PLATFORM_LIST},
        )
    except NotFoundError:
        return []
    async with response:
        raw = await response.read(MAX_MANIFEST)
        return _listed(raw, response.header("content-type") or "", what)


async def _from_api(session: Session, target: str, digest: str) -> list[Descriptor] | None:
    """All pages of the API's answer; None if what answers is not the API."""
    what = f"the referrers of {session.reference.name}@{digest}"
    found: list[Descriptor] = []
    for _ in range(_MAX_PAGES):
        response = await session.open(
            "GET", target, what=what, headers={"Accept": OCI_PLATFORM_LIST}
        )
        async with response:
            content_type = response.header("content-type") or ""
            if content_type.partition(";")[0].strip() != OCI_PLATFORM_LIST:
                return None
            raw = await response.read(MAX_MANIFEST)
        found += _listed(raw, content_type, what)
        following = next_page(response.header("link"))
        if following is None:
            return found
        target = urljoin(response.url, following)
    raise ProtocolError(f"{what} fill more than {_MAX_PAGES} pages")


def _listed(raw: bytes | None, content_type: str, what: str) -> list[Descriptor]:
    if raw is None:
        raise too_large(what)
    parsed = parse(raw, content_type, what)
    if not isinstance(parsed, PlatformList):
        raise ProtocolError(f"{what} are not a list")
    return list(parsed.manifests)
