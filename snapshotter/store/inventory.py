"""What is in a store: layers, file indexes, records of images, and what has no business there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from snapshotter.store.durable import TEMPORARY_PREFIX
from snapshotter.store.errors import store_error
from snapshotter.store.images import read_records
from snapshotter.store.layers import GONE_PREFIX
from snapshotter.store.leases import is_open_elsewhere
from snapshotter.store.presence import read_presence
from snapshotter.store.space import tree_sizes

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from snapshotter.store.images import ImageRecord


@dataclass(frozen=True, slots=True)
class LayerFacts:
    """A layer on disk. `disk` is what it takes there, `size` its raw space, `local` how much of
    that is durably present: in bytes. `used_ns` is when it was last used, since the epoch."""

    key: bytes
    disk: int
    size: int
    local: int
    used_ns: int


@dataclass(frozen=True, slots=True)
class ImageFacts:
    """An image that the node knows. `disk` is what its record takes."""

    record: ImageRecord
    disk: int
    used_ns: int


@dataclass(frozen=True, slots=True)
class Inventory:
    """All of a store. `layers` go by content key, `indexes` (bytes of disk) by digest, `leftovers`
    (bytes of disk) by path: of interrupted work, or damaged."""

    layers: dict[bytes, LayerFacts]
    indexes: dict[bytes, int]
    images: list[ImageFacts]
    leftovers: dict[Path, int]

    @property
    def disk(self) -> int:
        """Bytes of disk that all of it takes."""
        return sum(
            (
                sum(layer.disk for layer in self.layers.values()),
                sum(self.indexes.values()),
                sum(image.disk for image in self.images),
                sum(self.leftovers.values()),
            )
        )


def survey(root: Path) -> Inventory:
    """Look at everything in a store; nothing is changed. Blocks. Raises StoreError.

    What is written meanwhile may be seen half: temporary files are leftovers only to who owns the
    store and writes nothing.
    """
    leftovers: dict[Path, int] = {}
    try:
        layers = {facts.key: facts for facts in _layers(root / "layers", leftovers)}
        indexes = _indexes(root / "indexes", leftovers)
        images = _images(root / "images", leftovers)
    except OSError as error:
        raise store_error(error, root, "cannot look at") from error
    return Inventory(layers, indexes, images, leftovers)


def layer_directory(root: Path, key: bytes) -> Path:
    return root / "layers" / key.hex()


def kernel_uses(root: Path, key: bytes) -> bool:
    """Whether somebody but a store has a closed layer's raw file open: a mount of the kernel's."""
    return is_open_elsewhere(layer_directory(root, key) / "raw")


def _layers(directory: Path, leftovers: dict[Path, int]) -> Iterator[LayerFacts]:
    for path in _listing(directory):
        key = _digest(path.name)
        if key is None or not path.is_dir():
            leftovers[path] = _size(path)
            continue
        try:
            size, local = read_presence(path / "present")
        except FileNotFoundError:  # it is being made, or was not made to the end
            size = local = 0
        try:
            yield LayerFacts(key, _size(path), size, local, path.stat().st_mtime_ns)
        except FileNotFoundError:
            continue


def _indexes(directory: Path, leftovers: dict[Path, int]) -> dict[bytes, int]:
    found: dict[bytes, int] = {}
    for path in _listing(directory):
        digest = _digest(path.stem)
        if digest is None or path.suffix not in (".index", ".erofs"):
            leftovers[path] = _size(path)
        else:
            found[digest] = found.get(digest, 0) + _size(path)
    return found


def _images(directory: Path, leftovers: dict[Path, int]) -> list[ImageFacts]:
    found = []
    readable = {record.manifest_digest: record for record in read_records(directory)}
    for path in _listing(directory):
        record = readable.get(f"sha256:{path.stem}") if path.suffix == ".json" else None
        if record is None:
            leftovers[path] = _size(path)
        else:
            found.append(ImageFacts(record, _size(path), path.stat().st_mtime_ns))
    return found


def is_temporary(path: Path) -> bool:
    """Whether a leftover is of a write or a removal that was interrupted, or is going on."""
    return path.name.startswith((TEMPORARY_PREFIX, GONE_PREFIX))


def _listing(directory: Path) -> list[Path]:
    try:
        return sorted(directory.iterdir())
    except FileNotFoundError:
        return []


def _size(path: Path) -> int:
    return sum(tree_sizes(path)) if path.is_dir() else 512 * path.lstat().st_blocks


def _digest(name: str) -> bytes | None:
    try:
        digest = bytes.fromhex(name)
    except ValueError:
        return None
    return digest if len(digest) == 32 and name == digest.hex() else None
