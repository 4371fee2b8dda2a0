"""An image in a registry, to be read: manifests, blobs, ranges of blobs, referrers.

Source: OCI distribution spec 1.1, "Pull". No `/v2/` ping: a registry that wants authentication
says so at the first request that needs it. `mirrors` decides which host is asked.
"""

from __future__ import annotations

from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import trio

from index.errors import IntegrityError
from snapshotter.registry import image, ranges, referrers
from snapshotter.registry.digests import check_digest, digest_of, verify
from snapshotter.registry.errors import (
    NetworkError,
    NotFoundError,
    ProtocolError,
    RegistryError,
)
from snapshotter.registry.host import Use
from snapshotter.registry.manifest import ACCEPT, MAX_MANIFEST, parse, too_large
from snapshotter.registry.retry import RetryPolicy, retry

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable

    from snapshotter.registry.manifest import Descriptor, Manifest, PlatformList
    from snapshotter.registry.mirrors import Repository
    from snapshotter.registry.platform import Platform
    from snapshotter.registry.session import Session
    from snapshotter.registry.transport import Response

_LOCATION_LIFETIME = 300.0
"""Seconds for which a blob's redirect is used again. Signed URLs are good for 20 minutes with
distribution's S3 driver and for longer elsewhere; one that expired earlier is asked for anew."""


_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class _Range:
    """A range that a host has begun to send, after `skip` bytes that are not part of it."""

    session: Session
    response: Response
    skip: int


class Registry:
    """One reference's image. An `ImageSource`."""

    def __init__(self, repository: Repository, *, policy: RetryPolicy | None = None) -> None:
        """`policy` is for everything but ranges, whose caller decides."""
        self._repository = repository
        self._policy = policy or RetryPolicy()
        # By host and digest: where the host redirects to, and when to forget it.
        self._locations: dict[tuple[str, str], tuple[str, float]] = {}

    @property
    def name(self) -> str:
        return str(self._repository.reference)

    async def fetch_root(self) -> Manifest | PlatformList:
        selector = self._repository.reference.selector
        use = Use.CONTENT if ":" in selector else Use.TAG  # no tag has one
        return await self._first(
            use, selector, lambda session: self._get_manifest(session, selector, self.name)
        )

    async def fetch_manifest(self, descriptor: Descriptor) -> Manifest | PlatformList:
        digest = descriptor.digest
        what = f"manifest {self._repository.reference.name}@{digest}"
        return await self._first(
            Use.CONTENT, digest, lambda session: self._get_manifest(session, digest, what)
        )

    async def resolve(self, platform: Platform) -> image.ResolvedImage:
        return await image.resolve(self, platform)

    async def fetch_blob(self, descriptor: Descriptor, *, max_size: int) -> bytes:
        if descriptor.size > max_size:
            raise ProtocolError(
                f"{self._blob_name(descriptor)} has {descriptor.size} bytes; {max_size} are allowed"
            )
        return await self._first(
            Use.CONTENT, descriptor.digest, lambda session: self._get_blob(session, descriptor)
        )

    @asynccontextmanager
    async def open_range(
        self, descriptor: Descriptor, start: int, end: int
    ) -> AsyncGenerator[AsyncIterator[bytes], None]:
        image.check_range(descriptor, start, end)
        if start == end:
            yield _nothing()
            return
        begun = await self._repository.first(
            Use.CONTENT,
            descriptor.digest,
            lambda session: self._begin_range(session, descriptor, start, end),
        )
        drain = begun.response.status == 206 or end == descriptor.size
        what = self._blob_name(descriptor)
        async with (
            begun.response,
            aclosing(begun.response.pieces()) as body,
            aclosing(ranges.cut(body, begun.skip, end - start, drain=drain, what=what)) as cut,
            aclosing(self._watched(cut, begun.session, descriptor)) as pieces,
        ):
            yield pieces

    def doubt(self, descriptor: Descriptor) -> None:
        self._repository.doubt(descriptor.digest)

    async def referrers(self, digest: str, artifact_type: str) -> list[Descriptor]:
        what = f"referrers of {digest}"

        async def find(session: Session) -> list[Descriptor]:
            found = await referrers.find(session, digest, artifact_type)
            if not found and session.hurried:
                raise NotFoundError(f"{what}: none here")  # mirrors seldom copy them
            return found

        return await self._first(Use.REFERRERS, what, find)

    async def _first(
        self, use: Use, subject: str, operation: Callable[[Session], Awaitable[_T]]
    ) -> _T:
        return await retry(lambda: self._repository.first(use, subject, operation), self._policy)

    def _blob_name(self, descriptor: Descriptor) -> str:
        return f"blob {self._repository.reference.name}@{descriptor.digest}"

    async def _get_manifest(
        self, session: Session, selector: str, what: str
    ) -> Manifest | PlatformList:
        response = await session.open(
            "GET", f"manifests/{selector}", what=what, headers={"Accept": ACCEPT}
        )
        async with response:
            _refuse_encoded(response, what)
            raw = await response.read(MAX_MANIFEST)
            if raw is None:
                raise too_large(what)
        if ":" in selector:
            verify(raw, check_digest(selector), what)
        parsed = parse(raw, response.header("content-type") or "", what)
        claimed = response.header("docker-content-digest") or ""
        if claimed.startswith("sha256:") and claimed != digest_of(raw):
            raise IntegrityError(f"{what} came with digest {claimed} but has {digest_of(raw)}")
        return parsed

    async def _get_blob(self, session: Session, descriptor: Descriptor) -> bytes:
        what = self._blob_name(descriptor)
        try:
            async with await self._open_blob(session, descriptor, {}) as response:
                _refuse_encoded(response, what)
                if response.status != 200:
                    raise ProtocolError(f"{what}: unexpected status {response.status}")
                data = await response.read(descriptor.size)
        except RegistryError:
            self._forget_location(session, descriptor)
            raise
        if data is None:
            raise ProtocolError(f"{what} has more than its {descriptor.size} bytes")
        if len(data) < descriptor.size:
            raise NetworkError(f"{what}: body ended {descriptor.size - len(data)} bytes early")
        verify(data, descriptor.digest, what)
        return data

    async def _begin_range(
        self, session: Session, descriptor: Descriptor, start: int, end: int
    ) -> _Range:
        what = self._blob_name(descriptor)
        response = None
        try:
            response = await self._open_blob(
                session, descriptor, {"Range": ranges.range_header(start, end)}
            )
            _refuse_encoded(response, what)
            skip = ranges.offset_in_body(
                response.status,
                content_range=response.header("content-range"),
                content_length=response.content_length,
                start=start,
                end=end,
                size=descriptor.size,
                what=what,
            )
        except RegistryError:
            self._forget_location(session, descriptor)
            if response is not None:
                await response.aclose()
            raise
        return _Range(session, response, skip)

    async def _watched(
        self, pieces: AsyncGenerator[bytes, None], session: Session, descriptor: Descriptor
    ) -> AsyncGenerator[bytes, None]:
        """`pieces`; when they fail on the way, the next attempt is made elsewhere."""
        try:
            async for piece in pieces:
                yield piece
        except RegistryError as error:
            self._forget_location(session, descriptor)
            self._repository.failed(session, descriptor.digest, error)
            raise

    async def _open_blob(
        self, session: Session, descriptor: Descriptor, headers: dict[str, str]
    ) -> Response:
        """GET a blob, by the redirect of last time if that is still good."""
        what = self._blob_name(descriptor)
        key = (session.endpoint.base, descriptor.digest)
        url, expires = self._locations.get(key, ("", 0.0))
        if trio.current_time() < expires:
            try:
                return await session.open("GET", url, what=what, headers=headers)
            except RegistryError as error:
                if error.transient:
                    raise
        self._locations.pop(key, None)
        response = await session.open(
            "GET", f"blobs/{descriptor.digest}", what=what, headers=headers
        )
        if not session.endpoint.is_origin_of(response.url):
            expires = trio.current_time() + _LOCATION_LIFETIME
            self._locations[key] = (response.url, expires)
        return response

    def _forget_location(self, session: Session, descriptor: Descriptor) -> None:
        self._locations.pop((session.endpoint.base, descriptor.digest), None)


def _refuse_encoded(response: Response, what: str) -> None:
    """Nothing but `identity` was asked for, and a digest is over the blob as it is."""
    encoding = response.header("content-encoding") or "identity"
    if encoding.lower() != "identity":
        raise ProtocolError(f"{what} came with Content-Encoding {encoding[:40]}")


async def _nothing() -> AsyncGenerator[bytes, None]:
    return
    yield
