"""An image in a registry, to be read: manifests, blobs, ranges of blobs, referrers.

Source: OCI distribution spec 1.1, "Pull". No `/v2/` ping: a registry that wants authentication
says so at the first request that needs it.
"""

from __future__ import annotations

from contextlib import aclosing, asynccontextmanager
from typing import TYPE_CHECKING

import trio

from index.errors import IntegrityError
from snapshotter.registry import image, ranges, referrers
from snapshotter.registry.digests import check_digest, digest_of, verify
from snapshotter.registry.errors import (
    NetworkError,
    ProtocolError,
    RegistryError,
)
from snapshotter.registry.manifest import ACCEPT, MAX_MANIFEST, parse, too_large
from snapshotter.registry.retry import RetryPolicy, retry

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator

    from snapshotter.registry.manifest import Descriptor, Manifest, PlatformList
    from snapshotter.registry.platform import Platform
    from snapshotter.registry.session import Session
    from snapshotter.registry.transport import Response

_LOCATION_LIFETIME = 300.0
"""Seconds for which a blob's redirect is used again. Signed URLs are good for 20 minutes with
distribution's S3 driver and for longer elsewhere; one that expired earlier is asked for anew."""


class Registry:
    """One reference's image. An `ImageSource`."""

    def __init__(self, session: Session, *, policy: RetryPolicy | None = None) -> None:
        """`policy` is for everything but ranges, whose caller decides."""
        self._session = session
        self._policy = policy or RetryPolicy()
        self._locations: dict[str, tuple[str, float]] = {}  # by digest: URL, when to forget it

    @property
    def name(self) -> str:
        return str(self._session.reference)

    async def fetch_root(self) -> Manifest | PlatformList:
        selector = self._session.reference.selector
        return await retry(lambda: self._get_manifest(selector, self.name), self._policy)

    async def fetch_manifest(self, descriptor: Descriptor) -> Manifest | PlatformList:
        what = f"manifest {self._session.reference.name}@{descriptor.digest}"
        return await retry(lambda: self._get_manifest(descriptor.digest, what), self._policy)

    async def resolve(self, platform: Platform) -> image.ResolvedImage:
        return await image.resolve(self, platform)

    async def fetch_blob(self, descriptor: Descriptor, *, max_size: int) -> bytes:
        what = self._blob_name(descriptor)
        if descriptor.size > max_size:
            raise ProtocolError(f"{what} has {descriptor.size} bytes; {max_size} are allowed")
        return await retry(lambda: self._get_blob(descriptor, what), self._policy)

    @asynccontextmanager
    async def open_range(
        self, descriptor: Descriptor, start: int, end: int
    ) -> AsyncGenerator[AsyncIterator[bytes], None]:
        image.check_range(descriptor, start, end)
        if start == end:
            yield _nothing()
            return
        what = self._blob_name(descriptor)
        headers = {"Range": ranges.range_header(start, end)}
        try:
            async with await self._open_blob(descriptor, headers) as response:
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
                drain = response.status == 206 or end == descriptor.size
                async with (
                    aclosing(response.pieces()) as body,
                    aclosing(ranges.cut(body, skip, end - start, drain=drain, what=what)) as pieces,
                ):
                    yield pieces
        except RegistryError:
            self._locations.pop(descriptor.digest, None)
            raise

    async def referrers(self, digest: str, artifact_type: str) -> list[Descriptor]:
        return await retry(
            lambda: referrers.find(self._session, digest, artifact_type), self._policy
        )

    def _blob_name(self, descriptor: Descriptor) -> str:
        return f"blob {self._session.reference.name}@{descriptor.digest}"

    async def _get_manifest(self, selector: str, what: str) -> Manifest | PlatformList:
        response = await self._session.open(
            "GET", f"manifests/{selector}", what=what, headers={"Accept": ACCEPT}
        )
        async with response:
            _refuse_encoded(response, what)
            raw = await response.read(MAX_MANIFEST)
            if raw is None:
                raise too_large(what)
        if ":" in selector:  # no tag has one
            verify(raw, check_digest(selector), what)
        parsed = parse(raw, response.header("content-type") or "", what)
        claimed = response.header("docker-content-digest") or ""
        if claimed.startswith("sha256:") and claimed != digest_of(raw):
            raise IntegrityError(f"{what} came with digest {claimed} but has {digest_of(raw)}")
        return parsed

    async def _get_blob(self, descriptor: Descriptor, what: str) -> bytes:
        try:
            async with await self._open_blob(descriptor, {}) as response:
                _refuse_encoded(response, what)
                if response.status != 200:
                    raise ProtocolError(f"{what}: unexpected status {response.status}")
                data = await response.read(descriptor.size)
        except RegistryError:
            self._locations.pop(descriptor.digest, None)
            raise
        if data is None:
            raise ProtocolError(f"{what} has more than its {descriptor.size} bytes")
        if len(data) < descriptor.size:
            raise NetworkError(f"{what}: body ended {descriptor.size - len(data)} bytes early")
        verify(data, descriptor.digest, what)
        return data

    async def _open_blob(self, descriptor: Descriptor, headers: dict[str, str]) -> Response:
        """GET a blob, by the redirect of last time if that is still good."""
        what = self._blob_name(descriptor)
        url, expires = self._locations.get(descriptor.digest, ("", 0.0))
        if trio.current_time() < expires:
            try:
                return await self._session.open("GET", url, what=what, headers=headers)
            except RegistryError as error:
                if error.transient:
                    raise
        self._locations.pop(descriptor.digest, None)
        response = await self._session.open(
            "GET", f"blobs/{descriptor.digest}", what=what, headers=headers
        )
        if not self._session.endpoint.is_origin_of(response.url):
            expires = trio.current_time() + _LOCATION_LIFETIME
            self._locations[descriptor.digest] = (response.url, expires)
        return response


def _refuse_encoded(response: Response, what: str) -> None:
    """Nothing but `identity` was asked for, and a digest is over the blob as it is."""
    encoding = response.header("content-encoding") or "identity"
    if encoding.lower() != "identity":
        raise ProtocolError(f"{what} came with Content-Encoding {encoding[:40]}")


async def _nothing() -> AsyncGenerator[bytes, None]:
    return
    yield
