"""What the node knows about images it has mounted: mounting again needs no network."""

from __future__ import annotations

import hashlib
import logging
import os
import re
from contextlib import suppress
from typing import TYPE_CHECKING

import msgspec

from index.errors import FormatError
from snapshotter.store.durable import (
    discard_temporaries,
    make_directory,
    remove_file,
    write_file,
)

if TYPE_CHECKING:
    from pathlib import Path

log = logging.getLogger(__name__)

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


class ImageRecord(msgspec.Struct, frozen=True):
    """One image, pinned by digest. Kept as JSON, bytes in base64.

    `manifest_digest` is in OCI's form (sha256:...) and is that of the bytes in `manifest`;
    `config` is the configuration blob as it came. `index_digest` is the file index's, 32 bytes.
    `trust` says where that came from: `annotation`, `referrer` or `local`. `content_keys` name the
    layers in the store. `pack` is the digest and `pack_size` the size of the startup pack that goes
    with the index, if there is one. `prefixes` are the digests of file indexes of its lower layers
    alone, by their number.
    """

    reference: str
    manifest_digest: str
    manifest: bytes
    config: bytes
    index_digest: bytes
    trust: str
    content_keys: list[bytes] = []
    prefixes: dict[int, bytes] = {}
    pack: str = ""
    pack_size: int = 0

    @property
    def all_indexes(self) -> set[bytes]:
        """The digests of every file index that it names."""
        return {self.index_digest, *self.prefixes.values()}


class ImageStore:
    """`<root>/images/<hex of the manifest's digest>.json`, each written as a whole, durably."""

    def __init__(self, root: Path, *, writer: bool = True) -> None:
        """Raises StoreError if the directory cannot be made.

        Without `writer` it is only read, while a daemon may be writing.
        """
        self._directory = root / "images"
        if not writer:
            return
        make_directory(self._directory)
        discard_temporaries(self._directory)

    def get(self, manifest_digest: str) -> ImageRecord | None:
        """The record, or None if there is none; a damaged one is logged and counts as none."""
        return _read(self._path(manifest_digest))

    def put(self, record: ImageRecord) -> None:
        """Keep a record, in place of the image's former one. Raises StoreError."""
        write_file(self._path(record.manifest_digest), [msgspec.json.encode(record)])

    def remove(self, manifest_digest: str) -> None:
        """Forget an image; one that is not there is fine. Raises StoreError."""
        remove_file(self._path(manifest_digest))

    def touch(self, manifest_digest: str) -> None:
        """An image is used now; its record's mtime says so. It is not worth an error."""
        with suppress(OSError):
            os.utime(self._path(manifest_digest))

    def all(self) -> list[ImageRecord]:
        """Every readable record."""
        return read_records(self._directory)

    def _path(self, manifest_digest: str) -> Path:
        if not _DIGEST.fullmatch(manifest_digest):
            raise FormatError(f"{manifest_digest!r} is no SHA-256 digest")
        return self._directory / f"{manifest_digest.removeprefix('sha256:')}.json"


def read_records(directory: Path) -> list[ImageRecord]:
    """Every readable record in an image store's directory, which may not be there."""
    found = (_read(path) for path in sorted(directory.glob("*.json")) if len(path.stem) == 64)
    return [record for record in found if record is not None]


def _read(path: Path) -> ImageRecord | None:
    try:
        record = msgspec.json.decode(path.read_bytes(), type=ImageRecord)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.MsgspecError) as error:
        log.error("%s cannot be read: %s", path, error)
        return None
    found = hashlib.sha256(record.manifest).hexdigest()
    if record.manifest_digest != f"sha256:{found}" or found != path.stem:
        log.error("%s is damaged: it holds the manifest sha256:%s", path, found)
        return None
    return record
