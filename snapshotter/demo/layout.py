"""Writes layers and an image as an OCI layout, the way image builders do: tar, then gzip.

Sources: image-spec (image-layout.md, manifest.md, config.md).
"""

from __future__ import annotations

import gzip
import hashlib
import io
import tarfile
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, BinaryIO

import msgspec
import trio

from snapshotter.registry.digests import digest_of
from snapshotter.registry.layout import Layout
from snapshotter.registry.manifest import OCI_CONFIG, OCI_LAYER, Descriptor, Manifest

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

GZIP_LEVEL = 6  # what image builders use
MADE_MTIME = 1_700_000_000  # seconds: an arbitrary day in 2023, for all that is made up
_BLOCK = 1 << 18  # bytes handed to gzip at once


@dataclass(frozen=True)
class HostFile:
    """An entry that is copied from this machine, with its mode and owner, and with its modification
    time unless it is a directory (those of this machine change with what else is in them) or is not
    to be `dated`."""

    name: str
    path: Path
    dated: bool = True


@dataclass(frozen=True)
class MadeFile:
    """An entry that is made up here."""

    header: tarfile.TarInfo
    data: bytes = b""


@dataclass(frozen=True)
class PackedFile:
    """An entry that is copied from an uncompressed tar, which its header was read from."""

    header: tarfile.TarInfo
    tar: Path


Member = HostFile | MadeFile | PackedFile


@dataclass(frozen=True)
class Layer:
    """A finished layer blob. Sizes are bytes, compressed and not; `entries` are of every type."""

    digest: str
    diff_id: str
    size: int
    raw_size: int
    entries: int


def write_layer(
    blobs: Path, name: str, members: Sequence[Member], check: Callable[[], None]
) -> Layer:
    """Write a layer into `blobs` under its digest. `name` is that of a file there until then.

    `check` is called before each entry; what it raises ends the work.
    """
    unfinished = blobs / name
    with unfinished.open("wb") as file:
        compressed = _Hashing(file)
        # Without a name and a time in the gzip header, equal layers have equal digests.
        packed = gzip.GzipFile("", "wb", GZIP_LEVEL, compressed, mtime=0)
        raw = _Hashing(packed)
        with tarfile.open(fileobj=raw, mode="w|", bufsize=_BLOCK, format=tarfile.PAX_FORMAT) as tar:
            for member in members:
                check()
                _add(tar, member)
        packed.close()
    layer = Layer(compressed.digest, raw.digest, compressed.size, raw.size, len(members))
    unfinished.rename(blobs / _hex(layer.digest))
    return layer


def write_image(
    layout: Path, tag: str, layers: Sequence[Layer], config: Mapping[str, object]
) -> None:
    """Complete a layout whose `blobs/sha256` holds the layers. `config` lacks only "rootfs"."""
    rootfs = {"type": "layers", "diff_ids": [layer.diff_id for layer in layers]}
    data = msgspec.json.encode({**config, "rootfs": rootfs})
    config_blob = Descriptor(media_type=OCI_CONFIG, digest=digest_of(data), size=len(data))
    (layout / "blobs" / "sha256" / _hex(config_blob.digest)).write_bytes(data)
    layer_blobs = [
        Descriptor(media_type=f"{OCI_LAYER}+gzip", digest=layer.digest, size=layer.size)
        for layer in layers
    ]
    manifest = Manifest.build(config=config_blob, layers=layer_blobs)
    trio.run(partial(Layout(layout, tag).write_manifest, manifest, named=True))


def _add(tar: tarfile.TarFile, member: Member) -> None:
    if isinstance(member, MadeFile):
        tar.addfile(member.header, io.BytesIO(member.data))
        return
    if isinstance(member, PackedFile):
        with member.tar.open("rb") as file:
            file.seek(member.header.offset_data)
            tar.addfile(member.header, file if member.header.isreg() else None)
        return
    header = tar.gettarinfo(member.path, member.name)  # finds hard links, too
    header.uname = header.gname = ""
    header.mtime = int(header.mtime) if member.dated and not header.isdir() else MADE_MTIME
    if header.isreg():
        with member.path.open("rb") as file:
            tar.addfile(header, file)
    else:
        tar.addfile(header)


def _hex(digest: str) -> str:
    return digest.removeprefix("sha256:")


class _Hashing(io.RawIOBase):
    """Passes on what is written to it; knows its SHA-256 and size."""

    def __init__(self, target: BinaryIO | gzip.GzipFile) -> None:
        self._target = target
        self._hash = hashlib.sha256()
        self.size = 0

    def writable(self) -> bool:
        return True

    def write(self, data: bytes) -> int:  # type: ignore[override]  # tarfile and gzip give bytes
        self._hash.update(data)
        self.size += len(data)
        self._target.write(data)
        return len(data)

    @property
    def digest(self) -> str:
        return f"sha256:{self._hash.hexdigest()}"
