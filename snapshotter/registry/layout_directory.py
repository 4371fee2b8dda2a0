"""The files of an OCI layout directory: synchronous, atomic, durable. Run it in threads.

Source: OCI image spec 1.1, image-layout.md. A blob appears under its digest, and `index.json` is
replaced, only when the new file is complete and on disk.
"""

from __future__ import annotations

import fcntl
import os
import secrets
from contextlib import contextmanager
from typing import TYPE_CHECKING

from index.errors import IntegrityError
from snapshotter.registry.errors import LayoutError, NotFoundError, ProtocolError
from snapshotter.registry.manifest import (
    MAX_MANIFEST,
    OCI_PLATFORM_LIST,
    PlatformList,
    parse,
    too_large,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path
    from typing import BinaryIO

    from snapshotter.registry.manifest import Descriptor

_MARKER = b'{"imageLayoutVersion":"1.0.0"}'


class LayoutDirectory:
    """One layout directory. Raises LayoutError for what the file system refuses."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def create(self) -> None:
        """Make the directory a layout, if it is not one."""
        with _errors_of(self.root, "cannot write"):
            (self.root / "blobs" / "sha256").mkdir(parents=True, exist_ok=True)
        for name, content in (("oci-layout", _MARKER), ("index.json", PlatformList.build([]).raw)):
            if not (self.root / name).exists():
                self._replace(name, content)

    def entries(self) -> list[Descriptor]:
        """What `index.json` lists. NotFoundError if there is no layout."""
        what = f"index.json in {self.root}"
        with _errors_of(self.root, "cannot read"), (self.root / "index.json").open("rb") as file:
            raw = file.read(MAX_MANIFEST + 1)
        if len(raw) > MAX_MANIFEST:
            raise too_large(what)
        parsed = parse(raw, OCI_PLATFORM_LIST, what)
        if not isinstance(parsed, PlatformList):
            raise ProtocolError(f"{what} is not a list")
        return list(parsed.manifests)

    def write_entries(self, entries: Sequence[Descriptor]) -> None:
        """Replace what `index.json` lists. Hold the lock from before `entries` until after."""
        self._replace("index.json", PlatformList.build(entries).raw)

    def try_lock(self) -> int | None:
        """A descriptor that locks `index.json` until it is closed; None if another holds it.

        The lock is on the directory itself and leaves no file behind.
        """
        with _errors_of(self.root, "cannot lock"):
            descriptor = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                return None
            return descriptor

    def has_blob(self, digest: str) -> bool:
        """Whether the blob is there."""
        return self._blob_path(digest).exists()

    def open_blob(self, descriptor: Descriptor) -> BinaryIO:
        """A blob's file. IntegrityError if its size is not the descriptor's."""
        with _errors_of(self.root, f"cannot read blob {descriptor.digest}"):
            file = self._blob_path(descriptor.digest).open("rb")
            size = os.fstat(file.fileno()).st_size
        if size != descriptor.size:
            file.close()
            raise IntegrityError(
                f"blob {descriptor.digest} in {self.root} has {size} bytes, not {descriptor.size}"
            )
        return file

    def read(self, file: BinaryIO, length: int) -> bytes:
        """The next `length` bytes of a blob's file. IntegrityError if there are fewer."""
        with _errors_of(self.root, "cannot read"):
            data = file.read(length)
        if len(data) < length:
            raise IntegrityError(f"a blob in {self.root} was truncated while it was read")
        return data

    def draft(self) -> Draft:
        """A new blob, of no digest yet."""
        self.create()
        with _errors_of(self.root, "cannot write"):
            return Draft(self)

    def _replace(self, name: str, content: bytes) -> None:
        with _errors_of(self.root, "cannot write"):
            draft = Draft(self)
        try:
            draft.write(content)
            draft.publish(name)
        finally:
            draft.discard()

    def _blob_path(self, digest: str) -> Path:
        return self.root / blob_name(digest)


class Draft:
    """A file that is being written. It appears by `publish`; always end with `discard`."""

    def __init__(self, directory: LayoutDirectory) -> None:
        """Raises OSError."""
        self._directory = directory
        self._path = directory.root / f".firstbyte-{secrets.token_hex(8)}"
        self._file = self._path.open("xb", buffering=0)

    def write(self, data: bytes) -> None:
        """Append `data`."""
        with _errors_of(self._directory.root, "cannot write"):
            rest = memoryview(data)
            while rest:
                rest = rest[self._file.write(rest) :]

    def publish(self, name: str) -> None:
        """Make the file durable and give it its name, relative to the layout."""
        target = self._directory.root / name
        with _errors_of(self._directory.root, "cannot write"):
            os.fsync(self._file.fileno())
            self._path.replace(target)
            parent = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(parent)
            finally:
                os.close(parent)

    def discard(self) -> None:
        """Close, and remove the file if it was not published."""
        self._file.close()
        self._path.unlink(missing_ok=True)


def blob_name(digest: str) -> str:
    """A blob's path, relative to the layout."""
    algorithm, _, value = digest.partition(":")
    return f"blobs/{algorithm}/{value}"


@contextmanager
def _errors_of(root: Path, what: str) -> Iterator[None]:
    """The file system's refusals, as this room's errors."""
    try:
        yield
    except FileNotFoundError as error:
        hint = "is it an OCI layout?"
        raise NotFoundError(f"{what} in {root} (no such file)", hint=hint) from error
    except OSError as error:
        raise LayoutError(f"{what} in {root} ({error.strerror})") from error
