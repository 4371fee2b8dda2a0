"""An image in an OCI layout directory, to be read and written.

`index.json` lists what has a name, and artifacts, by whose `subject` referrers are found.
"""

from __future__ import annotations

import hashlib
import os
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import trio

from snapshotter.registry import image, referrers
from snapshotter.registry.digests import Verifier, verify
from snapshotter.registry.errors import (
    InvalidReferenceError,
    LayoutError,
    NotFoundError,
    ProtocolError,
)
from snapshotter.registry.layout_directory import Draft, LayoutDirectory, blob_name
from snapshotter.registry.manifest import (
    MAX_MANIFEST,
    Descriptor,
    Manifest,
    PlatformList,
    parse,
    too_large,
)
from snapshotter.registry.reference import LAYOUT_PREFIX

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator
    from typing import BinaryIO

    from snapshotter.registry.image import Body
    from snapshotter.registry.platform import Platform

REF_NAME = "org.opencontainers.image.ref.name"
"""The annotation in `index.json` that names an image."""

_LOCK_WITHIN = 30.0  # seconds; whoever holds the lock writes one small file
_LOCK_POLL = 0.02  # seconds


class Layout:
    """One image of a layout directory. An `ImageSource` and an `ImageSink`.

    `tag` None reads the only image that is there, and writes one without a name.
    """

    def __init__(self, root: Path, tag: str | None = None) -> None:
        self._directory = LayoutDirectory(root)
        self._tag = tag

    @classmethod
    def parse(cls, text: str) -> Layout:
        """Read `oci:PATH[:TAG]`. The path ends at the first colon, as in other tools.

        Raises InvalidReferenceError.
        """
        path, colon, tag = text.removeprefix(LAYOUT_PREFIX).partition(":")
        if not text.startswith(LAYOUT_PREFIX) or not path or (colon and not tag) or "\0" in text:
            raise InvalidReferenceError(
                f"malformed OCI layout {text[:300]!r}", hint="oci:PATH or oci:PATH:TAG"
            )
        return cls(Path(path), tag or None)

    @property
    def name(self) -> str:
        return f"{LAYOUT_PREFIX}{self._directory.root}" + (f":{self._tag}" if self._tag else "")

    async def fetch_root(self) -> Manifest | PlatformList:
        entries = await trio.to_thread.run_sync(self._directory.entries)
        return await self.fetch_manifest(self._chosen(entries))

    async def fetch_manifest(self, descriptor: Descriptor) -> Manifest | PlatformList:
        what = f"manifest {descriptor.digest} of {self.name}"
        if descriptor.size > MAX_MANIFEST:
            raise too_large(what)
        raw = await self.fetch_blob(descriptor, max_size=MAX_MANIFEST)
        return parse(raw, descriptor.media_type, what)

    async def resolve(self, platform: Platform) -> image.ResolvedImage:
        return await image.resolve(self, platform)

    async def fetch_blob(self, descriptor: Descriptor, *, max_size: int) -> bytes:
        what = f"blob {descriptor.digest} of {self.name}"
        if descriptor.size > max_size:
            raise ProtocolError(f"{what} has {descriptor.size} bytes; {max_size} are allowed")
        file = await trio.to_thread.run_sync(self._directory.open_blob, descriptor)
        with file:
            data = await trio.to_thread.run_sync(self._directory.read, file, descriptor.size)
        verify(data, descriptor.digest, what)
        return data

    @asynccontextmanager
    async def open_range(
        self, descriptor: Descriptor, start: int, end: int
    ) -> AsyncGenerator[AsyncIterator[bytes], None]:
        image.check_range(descriptor, start, end)
        file = await trio.to_thread.run_sync(self._directory.open_blob, descriptor)
        with file:
            file.seek(start)
            async with aclosing(self._pieces(file, end - start)) as pieces:
                yield pieces

    def doubt(self, descriptor: Descriptor) -> None:
        """There is no other place to read from."""

    async def referrers(self, digest: str, artifact_type: str) -> list[Descriptor]:
        found = []
        for entry in await trio.to_thread.run_sync(self._directory.entries):
            if entry.artifact_type in ("", artifact_type):
                manifest = await self.fetch_manifest(entry)
                subject = manifest.subject if isinstance(manifest, Manifest) else None
                if subject is not None and subject.digest == digest:
                    found.append(manifest.descriptor)
        return referrers.of_type(found, artifact_type)

    async def write_blob(self, descriptor: Descriptor, body: Body) -> None:
        if await trio.to_thread.run_sync(self._directory.has_blob, descriptor.digest):
            return
        verifier = Verifier(
            descriptor.digest, descriptor.size, f"blob {descriptor.digest} for {self.name}"
        )
        async with self._draft() as draft:
            async with body() as pieces:
                async for piece in pieces:
                    verifier.update(piece)
                    await trio.to_thread.run_sync(draft.write, piece)
            verifier.finish()
            await trio.to_thread.run_sync(draft.publish, blob_name(descriptor.digest))

    async def add_blob(self, media_type: str, body: AsyncIterator[bytes]) -> Descriptor:
        hasher = hashlib.sha256()
        size = 0
        async with self._draft() as draft:
            async for piece in body:
                hasher.update(piece)
                size += len(piece)
                await trio.to_thread.run_sync(draft.write, piece)
            digest = f"sha256:{hasher.hexdigest()}"
            await trio.to_thread.run_sync(draft.publish, blob_name(digest))
        return Descriptor(media_type=media_type, digest=digest, size=size)

    async def write_manifest(self, manifest: Manifest | PlatformList, *, named: bool) -> Descriptor:
        descriptor = manifest.descriptor
        await self.write_blob(descriptor, image.body_of(manifest.raw))
        if named or (isinstance(manifest, Manifest) and manifest.subject is not None):
            async with self._locked():
                await trio.to_thread.run_sync(self._list, descriptor, self._tag if named else None)
        return descriptor

    def _chosen(self, entries: list[Descriptor]) -> Descriptor:
        """The entry that our tag names; without one, the only image."""
        images = [entry for entry in entries if not entry.artifact_type]
        names = sorted(name for entry in images if (name := entry.annotation(REF_NAME)))
        hint = f"it has {', '.join(names)}" if names else "it has no named image"
        if self._tag is not None:
            for entry in images:
                if entry.annotation(REF_NAME) == self._tag:
                    return entry
            raise NotFoundError(f"{self.name}: no such image in the layout", hint=hint)
        if len(images) != 1:
            raise NotFoundError(f"{self.name} has {len(images)} images", hint=f"{hint}; add :TAG")
        return images[0]

    def _list(self, descriptor: Descriptor, name: str | None) -> None:
        """Add an entry to `index.json`, in the place of the one of that name. The lock is held."""
        kept = self._directory.entries()
        if name is not None:
            annotations = {**(descriptor.annotations or {}), REF_NAME: name}
            descriptor = msgspec.structs.replace(descriptor, annotations=annotations)
            kept = [entry for entry in kept if entry.annotation(REF_NAME) != name]
        # An entry without a name says nothing that the new one does not.
        kept = [
            entry
            for entry in kept
            if entry.digest != descriptor.digest or entry.annotation(REF_NAME)
        ]
        self._directory.write_entries([*kept, descriptor])

    async def _pieces(self, file: BinaryIO, length: int) -> AsyncGenerator[bytes, None]:
        while length:
            wanted = min(length, image.PIECE)
            yield await trio.to_thread.run_sync(self._directory.read, file, wanted)
            length -= wanted

    @asynccontextmanager
    async def _draft(self) -> AsyncGenerator[Draft, None]:
        draft = await trio.to_thread.run_sync(self._directory.draft)
        try:
            yield draft
        finally:
            draft.discard()

    @asynccontextmanager
    async def _locked(self) -> AsyncGenerator[None, None]:
        """Keep other writers of `index.json` out."""
        lock = self._directory.try_lock()
        with trio.move_on_after(_LOCK_WITHIN):
            while lock is None:
                await trio.sleep(_LOCK_POLL)
                lock = self._directory.try_lock()
        if lock is None:
            raise LayoutError(f"{self.name} is locked by another process")
        try:
            yield
        finally:
            os.close(lock)
