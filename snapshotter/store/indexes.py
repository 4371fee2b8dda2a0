"""Expanded file indexes on the node, by digest: mounting again needs no network."""

from __future__ import annotations

from typing import TYPE_CHECKING

from snapshotter.store.durable import (
    discard_temporaries,
    make_directory,
    remove_file,
    sync_file,
    write_file,
)

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path


class IndexStore:
    """`<root>/indexes/<digest>.index`. What is under a name and synced is there as a whole.

    Contents are the caller's to verify: `FileIndex` compares every section when it opens.
    """

    def __init__(self, root: Path, *, writer: bool = True) -> None:
        """Raises StoreError if the directory cannot be made.

        Without `writer` it is only read, while a daemon may be writing.
        """
        self._directory = root / "indexes"
        if not writer:
            return
        make_directory(self._directory)
        discard_temporaries(self._directory)

    def get(self, digest: bytes) -> Path | None:
        """Where the index with this digest (32 bytes) is, or None."""
        path = self._path(digest)
        return path if path.exists() else None

    def put(self, digest: bytes, data: bytes | memoryview | Iterable[bytes]) -> Path:
        """Keep an expanded index. Raises StoreError.

        A mount waits for this, so it does not wait for the disk: `sync` it before anything durable
        names it. What a power cut leaves is noticed when it is opened.
        """
        path = self._path(digest)
        write_file(path, [data] if isinstance(data, bytes | memoryview) else data, sync=False)
        return path

    def sync(self, digest: bytes) -> None:
        """Make an index that was `put` durable. Raises StoreError."""
        sync_file(self._path(digest))

    def tree(self, digest: bytes, data: bytes | memoryview) -> Path:
        """An index's EROFS image as a file of its own, written if it is not there yet.

        Raises StoreError.
        """
        path = self._path(digest).with_suffix(".erofs")
        if not path.exists():
            write_file(path, [data])
        return path

    def remove(self, digest: bytes) -> None:
        """Forget an index; one that is not there is fine. Raises StoreError."""
        remove_file(self._path(digest).with_suffix(".erofs"))
        remove_file(self._path(digest))

    def _path(self, digest: bytes) -> Path:
        return _named(self._directory, digest)


def index_path(root: Path, digest: bytes) -> Path:
    """Where the index with this digest is, if it is there."""
    return _named(root / "indexes", digest)


def _named(directory: Path, digest: bytes) -> Path:
    return directory / f"{digest.hex()}.index"
