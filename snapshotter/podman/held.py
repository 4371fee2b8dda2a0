"""What podman holds of the layer store, on disk: which layers, and how often.

A change is on disk before podman is told of it. A daemon that dies in between is asked again by
the kernel, and counts twice: a layer may then stay for longer than it is used, and never goes
while it is.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import msgspec

from snapshotter.store.durable import make_directory, write_file
from snapshotter.store.errors import StoreError, store_error

if TYPE_CHECKING:
    from pathlib import Path


class HeldImage(msgspec.Struct, frozen=True):
    """An image, pinned by its manifest's digest, as it was found under a reference.

    `number` is that of its lowest layer among all that were ever served; the others follow.
    `counts` are the uses of each layer, the lowest first.
    """

    reference: str
    manifest: str
    number: int
    counts: list[int]


class _File(msgspec.Struct):
    """`next_number` only grows: the kernel remembers the inodes of old layers."""

    next_number: int = 0
    images: list[HeldImage] = []


class HeldImages:
    """The file. Thread-safe; methods block and raise StoreError."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        try:
            self._file = msgspec.json.decode(path.read_bytes(), type=_File)
        except FileNotFoundError:
            self._file = _File()
        except OSError as error:
            raise store_error(error, path, "cannot read") from error
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise StoreError(
                f"{path} is damaged ({error})",
                hint="remove it, and then from podman the images that it pulled lazily",
            ) from error

    @property
    def images(self) -> list[HeldImage]:
        with self._lock:
            return list(self._file.images)

    def add(self, reference: str, manifest: str, layers: int) -> HeldImage:
        """Begin to serve an image, of which nobody uses any layer yet."""
        with self._lock:
            image = HeldImage(reference, manifest, self._file.next_number, [0] * layers)
            self._write([*self._file.images, image], image.number + layers)
            return image

    def change(self, image: HeldImage, layer: int, by: int) -> HeldImage:
        """Count uses of a layer; never less than none."""
        with self._lock:
            counts = list(image.counts)
            counts[layer] = max(0, counts[layer] + by)
            changed = msgspec.structs.replace(image, counts=counts)
            self._write(
                [changed if one.number == image.number else one for one in self._file.images],
                self._file.next_number,
            )
            return changed

    def remove(self, image: HeldImage) -> None:
        """Serve an image no more."""
        with self._lock:
            left = [one for one in self._file.images if one.number != image.number]
            self._write(left, self._file.next_number)

    def _write(self, images: list[HeldImage], next_number: int) -> None:
        file = _File(next_number, images)
        make_directory(self._path.parent)
        write_file(self._path, [msgspec.json.encode(file)])
        self._file = file
