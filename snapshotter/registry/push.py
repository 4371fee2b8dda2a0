"""An image in a registry, to be written: blob uploads, manifests, and making referrers findable.

All of it goes to one host, the first that may be pushed to.

Source: OCI distribution spec 1.1, "Push" and "Pushing Manifests with Subject". A blob of known
digest goes in one PUT. One whose digest only its end tells goes in one streamed PATCH and an empty
PUT, as docker and containers/image do it, which registries accept more widely than numbered chunks.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING
from urllib.parse import quote, urljoin

from snapshotter.registry import referrers
from snapshotter.registry.digests import Verifier
from snapshotter.registry.errors import (
    InvalidReferenceError,
    NotFoundError,
    ProtocolError,
)
from snapshotter.registry.host import Use
from snapshotter.registry.manifest import Descriptor, Manifest, PlatformList
from snapshotter.registry.retry import RetryPolicy, retry

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator

    from snapshotter.registry.image import Body
    from snapshotter.registry.mirrors import Repository
    from snapshotter.registry.session import Session

_COMMIT_WITHIN = 600.0  # seconds; guess: a registry on an object store copies the blob before 201
_BLOB = "application/octet-stream"


class RegistrySink:
    """One reference, to be pushed to. An `ImageSink`."""

    def __init__(self, repository: Repository, *, policy: RetryPolicy | None = None) -> None:
        self._repository = repository
        self._policy = policy or RetryPolicy()
        self._chosen: Session | None = None

    @property
    def name(self) -> str:
        return str(self._repository.reference)

    async def _session(self) -> Session:
        if self._chosen is None:
            self._chosen = await self._repository.only(Use.PUSH)
        return self._chosen

    async def write_blob(self, descriptor: Descriptor, body: Body) -> None:
        if not await retry(lambda: self._has_blob(descriptor), self._policy):
            await retry(lambda: self._upload(descriptor, body), self._policy)

    async def add_blob(self, media_type: str, body: AsyncIterator[bytes]) -> Descriptor:
        what = f"upload to {self._repository.reference.name}"
        location = await retry(self._start_upload, self._policy)
        hasher = hashlib.sha256()
        size = 0

        async def measured() -> AsyncGenerator[bytes, None]:
            nonlocal size
            async for piece in body:
                hasher.update(piece)
                size += len(piece)
                yield piece

        headers = {"Content-Type": _BLOB, "Transfer-Encoding": "chunked"}
        response = await (await self._session()).open(
            "PATCH", location, what=what, headers=headers, body=measured()
        )
        async with response:
            _expect(response.status, 202, what)
            location = _location(response.url, response.header("location"), what)
        digest = f"sha256:{hasher.hexdigest()}"
        await self._commit(location, digest, what)
        return Descriptor(media_type=media_type, digest=digest, size=size)

    async def write_manifest(self, manifest: Manifest | PlatformList, *, named: bool) -> Descriptor:
        descriptor = manifest.descriptor
        reference = self._repository.reference
        if named and reference.digest not in (None, descriptor.digest):
            raise InvalidReferenceError(
                f"cannot push {descriptor.digest} as {reference}", hint="leave the digest out"
            )
        selector = (reference.tag if named else None) or descriptor.digest
        indexed = await retry(lambda: self._put(selector, manifest), self._policy)
        subject = manifest.subject if isinstance(manifest, Manifest) else None
        if subject is not None and not indexed:
            await retry(lambda: self._list_referrer(subject, descriptor), self._policy)
        return descriptor

    async def _has_blob(self, descriptor: Descriptor) -> bool:
        """Redirects are not followed: signed for GET, they may refuse HEAD, and say enough."""
        what = f"blob {self._repository.reference.name}@{descriptor.digest}"
        try:
            response = await (await self._session()).open(
                "HEAD", f"blobs/{descriptor.digest}", what=what, follow=False
            )
        except NotFoundError:
            return False
        await response.discard()
        return True

    async def _start_upload(self) -> str:
        """The URL to upload a blob to."""
        what = f"upload to {self._repository.reference.name}"
        response = await (await self._session()).open("POST", "blobs/uploads/", what=what)
        async with response:
            _expect(response.status, 202, what)
            return _location(response.url, response.header("location"), what)

    async def _upload(self, descriptor: Descriptor, body: Body) -> None:
        what = f"blob {self._repository.reference.name}@{descriptor.digest}"
        location = await self._start_upload()
        response = await (await self._session()).open(
            "PUT",
            _with_digest(location, descriptor.digest),
            what=what,
            headers={"Content-Type": _BLOB, "Content-Length": str(descriptor.size)},
            body=_checked(body, descriptor, what),
            answer_within=_COMMIT_WITHIN,
        )
        async with response:
            _expect(response.status, 201, what)

    async def _commit(self, location: str, digest: str, what: str) -> None:
        response = await (await self._session()).open(
            "PUT", _with_digest(location, digest), what=what, answer_within=_COMMIT_WITHIN
        )
        async with response:
            _expect(response.status, 201, what)

    async def _put(self, selector: str, manifest: Manifest | PlatformList) -> bool:
        """Write a manifest under a tag or its digest; whether the registry indexed its subject."""
        what = f"manifest {self._repository.reference.name}, {selector}"
        response = await (await self._session()).open(
            "PUT",
            f"manifests/{selector}",
            what=what,
            headers={"Content-Type": manifest.media_type},
            body=manifest.raw,
        )
        async with response:
            _expect(response.status, 201, what)
            return response.header("oci-subject") is not None

    async def _list_referrer(self, subject: Descriptor, referrer: Descriptor) -> None:
        """Add to the fallback tag's list. Two pushes at once may lose one: the spec has no lock."""
        listed = await referrers.from_fallback_tag(await self._session(), subject.digest)
        updated = PlatformList.build(referrers.merged(listed, referrer))
        await self._put(referrers.fallback_tag(subject.digest), updated)


async def _checked(body: Body, descriptor: Descriptor, what: str) -> AsyncGenerator[bytes, None]:
    """A blob as it is read; IntegrityError if it is another."""
    verifier = Verifier(descriptor.digest, descriptor.size, what)
    async with body() as pieces:
        async for piece in pieces:
            verifier.update(piece)
            yield piece
    verifier.finish()


def _expect(status: int, expected: int, what: str) -> None:
    if status != expected:
        raise ProtocolError(f"{what}: unexpected status {status}, not {expected}")


def _location(url: str, location: str | None, what: str) -> str:
    if not location:
        raise ProtocolError(f"{what}: the registry does not say where to upload to")
    return urljoin(url, location)


def _with_digest(location: str, digest: str) -> str:
    separator = "&" if "?" in location else "?"
    return f"{location}{separator}digest={quote(digest, safe='')}"
