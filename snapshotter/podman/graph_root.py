"""A graph root of containers/storage whose images have one layer each: the merged, lazy tree; or
their own layers, as the layer store shows them.

podman and CRI-O read it as an *additional image store*: they run its images as they are, and never
write to it. Source: containers/storage `store.go`, `images.go`, `layers.go` and
`drivers/overlay/overlay.go`, and what podman 4.3, 5.4 and 5.8 write themselves.

    overlay/<layer>/diff          symbolic link to the directory that shows the image
                   /link          the layer's short name, for mount options
                   /lower         those of the layers below, if it has any
                   /additionallayer    the layer's directory in a layer store, whose `blob` is read
                                       when the image is pushed or saved
    overlay/l/<short name>        symbolic link to ../<layer>/diff
    overlay-layers/layers.json    the layers; layers.lock
    overlay-images/images.json    the images; images.lock
                  /<image>/       manifest and configuration, by the names that podman looks for
    overlay-images/withdrawn.json    ours: the image that is being removed

A layer is written before its image and goes after it; so a crash leaves at most a layer without an
image, which the next `open` removes. An image that was withdrawn, and not yet swept, is put back:
nobody knows whether a container has come to use it.
"""

from __future__ import annotations

import base64
import hashlib
import re
import shutil
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import msgspec

from snapshotter.podman.lockfile import locked_for_writing
from snapshotter.podman.merged import MergedImage, go_time, layered_image, merged_image
from snapshotter.registry.digests import digest_of
from snapshotter.store.durable import (
    discard_temporaries,
    make_directory,
    remove_file,
    sync_directory,
    write_file,
)
from snapshotter.store.errors import StoreError, store_error

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

DRIVER = "overlay"

_LINK_LENGTH = 26
_PLAIN_NAME = re.compile(r"[a-z0-9.]+")  # big data whose name is a file's name as it is
_HEX_ID = re.compile(r"[0-9a-f]{64}")

_encoder = msgspec.json.Encoder()

_Record = TypeVar("_Record", "Image", "Layer")


class _Metadata(msgspec.Struct, frozen=True, rename="kebab"):
    """What we note of an image where containers/image notes other things, and ignores these."""

    firstbyte_layers: str = ""


class Image(msgspec.Struct, frozen=True, kw_only=True, rename="kebab", omit_defaults=True):
    """A record of images.json. `id` is the hexadecimal digest of the configuration, `digest` that
    of the manifest in OCI's form, `names` are whole references, `layer` is the topmost layer's ID.
    """

    id: str
    digest: str
    names: list[str] | None = None
    names_history: list[str] | None = None
    layer: str
    metadata: str = ""
    big_data_names: list[str] = []
    big_data_sizes: dict[str, int] = {}
    big_data_digests: dict[str, str] = {}
    created: str

    @property
    def layers_at(self) -> str:
        """The image's directory in the layer store; "" if its layers are merged."""
        return msgspec.json.decode(self.metadata or "{}", type=_Metadata).firstbyte_layers

    @property
    def original(self) -> str:
        """The digest of the image's manifest in its registry."""
        if self.layers_at:
            return self.digest
        digests = (key.removeprefix("manifest-") for key in self.big_data_names)
        return next(one for one in digests if one.startswith("sha256:") and self._is_other(one))

    def _is_other(self, digest: str) -> bool:
        return digest not in (self.digest, f"sha256:{self.id}")


class Layer(msgspec.Struct, frozen=True, kw_only=True, rename="kebab", omit_defaults=True):
    """A record of layers.json. Sizes are in bytes. `compression` is a number of containers/storage
    `pkg/archive`."""

    id: str
    parent: str = ""
    created: str
    compressed_diff_digest: str = ""
    compressed_size: int = 0
    diff_digest: str
    diff_size: int
    compression: int = 0
    uidset: list[int] = []
    gidset: list[int] = []


class GraphRoot:
    """One graph root; we are its only writer. Thread-safe; methods block and raise StoreError."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._overlay = path / DRIVER
        self._images = path / f"{DRIVER}-images"
        self._layers = path / f"{DRIVER}-layers"
        self._lock = threading.Lock()

    def open(self) -> None:
        """Make what is missing, so that podman can start, and clean up after a crash."""
        with self._lock:
            for directory in (self._overlay / "l", self._images, self._layers):
                make_directory(directory)
                discard_temporaries(directory)
            for directory, kind in ((self._images, "images"), (self._layers, "layers")):
                if not (directory / f"{kind}.json").exists():
                    self._write(directory, kind, [])
            for image in self._read(self._withdrawn, list[Image]):
                self._restore(image)
            self._sweep()

    def images(self) -> list[Image]:
        """The images there are; none if there is no graph root yet."""
        with self._lock:
            return self._read_images()

    def add(self, name: str, manifest: bytes, config: bytes, tree: Path, size: int) -> Image:
        """Show an image, given as the bytes of manifest and configuration, by a whole reference.

        If it is there already it only gets one name more; another image loses the name. `tree` is
        the directory that shows the image.
        """
        merged = merged_image(manifest, config, size)
        with self._lock:
            known = next((one for one in self._read_images() if one.id == merged.id), None)
            self._make_layer(merged.layer, tree, size)
            image = _named(known or self._make_image(merged), name)
            self._put(image)
            return image

    def add_layers(
        self, name: str, manifest: bytes, config: bytes, layers: Sequence[Layer], directory: Path
    ) -> Image:
        """Show an image as `add` does, with its own `layers` (of `chain`), lowest first, which are
        in this `directory` of the layer store."""
        made = layered_image(manifest, config, layers[-1].id)
        with self._lock:
            images = self._read_images()
            known = next((one for one in images if one.id == made.id), None)
            image = _named(known or self._make_image(made, str(directory)), name)
            self._link_layers([*images, image], layers)
            self._make_layers(layers)
            self._put(image)
            return image

    def layers_of(self, image: Image) -> list[Layer]:
        """The layers of an image, lowest first."""
        with self._lock:
            return self._layers_of(image)

    def point(self, image: Image, tree: Path) -> None:
        """From now on containers that start find the image at `tree`."""
        with self._lock:
            self._link(self._overlay / image.layer / "diff", tree)

    def rename(self, image: Image, names: Iterable[str]) -> None:
        """Give an image other names; they must be nobody else's."""
        with self._lock:
            self._put(msgspec.structs.replace(image, names=list(names)))

    def withdraw(self, image: Image) -> None:
        """Take an image out of the list: nobody finds it any more. Its tree stays, for those who
        have found it; `restore` undoes this, and so does `open`; `sweep` makes it final."""
        with self._lock:
            write_file(self._withdrawn, [_encoder.encode([image])])
            self._write_images(one for one in self._read_images() if one.id != image.id)

    def restore(self, image: Image) -> None:
        """Put an image back that was withdrawn."""
        with self._lock:
            self._restore(image)

    def sweep(self) -> None:
        """Remove everything that is of no image."""
        with self._lock:
            remove_file(self._withdrawn)
            self._sweep()

    # --- files ---

    @property
    def _withdrawn(self) -> Path:
        return self._images / "withdrawn.json"

    def _read_images(self) -> list[Image]:
        return self._read(self._images / "images.json", list[Image])

    def _read_layers(self) -> list[Layer]:
        return self._read(self._layers / "layers.json", list[Layer])

    def _read(self, path: Path, kind: type[list[_Record]]) -> list[_Record]:
        try:
            return msgspec.json.decode(path.read_bytes(), type=kind)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise store_error(error, path, "cannot read") from error
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise StoreError(
                f"{path} is damaged ({error})", hint=f"remove {self.path}, and add the images again"
            ) from error

    def _restore(self, image: Image) -> None:
        self._put(image)
        remove_file(self._withdrawn)

    def _sweep(self) -> None:
        images = self._read_images()
        self._link_layers(images)  # to one of those that stay
        self._keep_layers({layer.id for image in images for layer in self._layers_of(image)})
        for folder in self._images.iterdir():
            if folder.is_dir() and folder.name not in {image.id for image in images}:
                shutil.rmtree(folder)

    def _put(self, image: Image) -> None:
        """An image in place of its former record; its names are nobody else's then."""
        names = set(image.names or [])
        others = [
            msgspec.structs.replace(one, names=[n for n in one.names or [] if n not in names])
            for one in self._read_images()
            if one.id != image.id
        ]
        self._write_images([*others, image])

    def _write_images(self, images: Iterable[Image]) -> None:
        self._write(self._images, "images", list(images))

    def _write(self, directory: Path, kind: str, records: object) -> None:
        with locked_for_writing(directory / f"{kind}.lock"):
            write_file(directory / f"{kind}.json", [_encoder.encode(records)])

    def _make_layer(self, layer: str, tree: Path, size: int) -> None:
        folder = self._overlay / layer
        make_directory(folder)
        self._link(folder / "diff", tree)
        write_file(folder / "link", [link_name(layer).encode()])
        self._link(self._overlay / "l" / link_name(layer), Path("..") / layer / "diff")
        layers = self._read_layers()
        if all(one.id != layer for one in layers):
            made = Layer(
                id=layer,
                created=_now(),
                diff_digest=f"sha256:{layer}",
                diff_size=size,
                uidset=[0],
                gidset=[0],
            )
            self._write(self._layers, "layers", [*layers, made])

    def _make_layers(self, layers: Sequence[Layer]) -> None:
        known = self._read_layers()
        there = {layer.id for layer in known}
        if made := [layer for layer in layers if layer.id not in there]:
            self._write(self._layers, "layers", [*known, *made])

    def _link_layers(self, images: Sequence[Image], new: Sequence[Layer] = ()) -> None:
        """Let the layers of images be where the layer store has them. Of images that share one the
        first counts: to who uses it they are the same. `new` are layers that are not listed yet."""
        done: set[str] = set()
        for image in images:
            below: list[str] = []
            for layer in self._layers_of(image, new) if image.layers_at else ():
                if layer.id not in done:
                    place = Path(image.layers_at, layer.compressed_diff_digest)
                    self._link_layer(layer.id, place, below)
                done.add(layer.id)
                below.insert(0, f"l/{link_name(layer.id)}")

    def _link_layer(self, layer: str, directory: Path, below: Sequence[str]) -> None:
        folder, short = self._overlay / layer, self._overlay / "l" / link_name(layer)
        diff = folder / "diff"
        if short.is_symlink() and diff.is_symlink() and diff.readlink() == directory / "diff":
            return
        make_directory(folder)
        texts = {"link": link_name(layer), "additionallayer": str(directory)}
        if below:
            texts["lower"] = ":".join(below)
        for name, text in texts.items():
            write_file(folder / name, [text.encode()])
        self._link(diff, directory / "diff")
        self._link(short, Path("..") / layer / "diff")

    def _layers_of(self, image: Image, new: Sequence[Layer] = ()) -> list[Layer]:
        known = {layer.id: layer for layer in (*new, *self._read_layers())}
        found: list[Layer] = []
        layer = known.get(image.layer)
        while layer is not None:
            found.insert(0, layer)
            layer = known.get(layer.parent)
        return found

    def _keep_layers(self, wanted: set[str]) -> None:
        """Remove all layers but those."""
        layers = self._read_layers()
        kept = [layer for layer in layers if layer.id in wanted]
        if kept != layers:
            self._write(self._layers, "layers", kept)
        links = {link_name(layer) for layer in wanted}
        for link in (self._overlay / "l").iterdir():
            if link.name not in links:
                link.unlink()
        for folder in self._overlay.iterdir():
            if _HEX_ID.fullmatch(folder.name) and folder.name not in wanted:
                shutil.rmtree(folder)  # of links and one small file: it follows none

    def _make_image(self, merged: MergedImage, layers_at: str = "") -> Image:
        folder = self._images / merged.id
        make_directory(folder)
        for key, value in merged.data.items():
            write_file(folder / _data_name(key), [value])
        return Image(
            id=merged.id,
            digest=merged.manifest_digest,
            layer=merged.layer,
            metadata=_encoder.encode(_Metadata(layers_at)).decode() if layers_at else "{}",
            big_data_names=list(merged.data),
            big_data_sizes={key: len(value) for key, value in merged.data.items()},
            big_data_digests={key: digest_of(value) for key, value in merged.data.items()},
            created=merged.created,
        )

    def _link(self, path: Path, target: Path) -> None:
        """Make a symbolic link, or make it point elsewhere at once."""
        temporary = path.with_name(f".new-{path.name}")
        try:
            if path.is_symlink() and path.readlink() == target:
                return
            temporary.unlink(missing_ok=True)
            temporary.symlink_to(target)
            temporary.rename(path)
            sync_directory(path.parent)
        except OSError as error:
            raise store_error(error, path, "cannot link") from error


def link_name(layer: str) -> str:
    """The short name of a layer, in the form that the overlay driver makes at random."""
    return base64.b32encode(bytes.fromhex(layer))[:_LINK_LENGTH].decode()


def chain(layers: Iterable[Layer]) -> list[Layer]:
    """The layers of an image, lowest first, with the IDs that containers/image gives them: so what
    is built on them, or shares them, is found to do so. Source: `storage/storage_dest.go`."""
    made: list[Layer] = []
    for layer in layers:
        parent, own = made[-1].id if made else "", layer.diff_digest.removeprefix("sha256:")
        name = hashlib.sha256(f"{parent}+{own}".encode()).hexdigest() if parent else own
        made.append(msgspec.structs.replace(layer, id=name, parent=parent))
    return made


def _named(image: Image, name: str) -> Image:
    names = list(dict.fromkeys([*(image.names or []), name]))
    history = list(dict.fromkeys([name, *(image.names_history or [])]))
    return msgspec.structs.replace(image, names=names, names_history=history)


def _data_name(key: str) -> str:
    """The file of an image's big data: containers/storage `makeBigDataBaseName`."""
    if _PLAIN_NAME.fullmatch(key):
        return key
    return "=" + base64.b64encode(key.encode()).decode()


def _now() -> str:
    return go_time(datetime.now(UTC))
