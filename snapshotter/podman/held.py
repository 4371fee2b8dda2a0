"""What podman holds of the layer store, on disk: which layers, and how often.

A change is on disk before podman is told of it. If the daemon dies in between, the kernel asks the
next one again; so the numbers of the requests that were counted last are on disk, too, and none is
counted twice. (Kernels before 6.9 do not ask again.)
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import msgspec

from snapshotter.store.durable import make_directory, write_file
from snapshotter.store.errors import StoreError, store_error

if TYPE_CHECKING:
    from pathlib import Path

    from snapshotter.fuse.live import Call

# Calls that are known again. Each of podman's threads waits for one, and a pull has six.
_REMEMBERED = 256


class HeldImage(msgspec.Struct, frozen=True):
    """An image, pinned by its manifest's digest, as it was found under a reference.

    `number` is that of its lowest layer among all that were ever served; the others follow.
    `counts` are the uses of each layer, the lowest first.
    """

    reference: str
    manifest: str
    number: int
    counts: list[int]


class _File(msgspec.Struct, frozen=True):
    """`next_number` only grows: the kernel remembers the inodes of old layers. `counted` are the
    numbers of requests of the FUSE mount that is, the latest last."""

    next_number: int = 0
    images: list[HeldImage] = []
    counted: list[int] = []


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
            self._write(
                msgspec.structs.replace(
                    self._file,
                    next_number=image.number + layers,
                    images=[*self._file.images, image],
                )
            )
            return image

    def has_counted(self, call: Call) -> bool:
        """Whether a call was counted, by a predecessor that could not answer it any more."""
        with self._lock:
            return call.again and call.number in self._file.counted

    def begin_mount(self) -> None:
        """The FUSE mount is a new one, with numbers of its own."""
        with self._lock:
            if self._file.counted:
                self._write(msgspec.structs.replace(self._file, counted=[]))

    def change(self, image: HeldImage, layer: int, by: int, call: Call) -> HeldImage:
        """Count uses of a layer, as a call says; never less than none."""
        with self._lock:
            counts = list(image.counts)
            counts[layer] = max(0, counts[layer] + by)
            changed = msgspec.structs.replace(image, counts=counts)
            images = [changed if one.number == image.number else one for one in self._file.images]
            counted = [*self._file.counted, call.number][-_REMEMBERED:]
            self._write(msgspec.structs.replace(self._file, images=images, counted=counted))
            return changed

    def remove(self, image: HeldImage) -> None:
        """Serve an image no more."""
        with self._lock:
            left = [one for one in self._file.images if one.number != image.number]
            self._write(msgspec.structs.replace(self._file, images=left))

    def _write(self, file: _File) -> None:
        make_directory(self._path.parent)
        write_file(self._path, [msgspec.json.encode(file)])
        self._file = file
