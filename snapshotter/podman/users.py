"""Who uses a layer of an additional image store: containers, and images that were built on it.

Whatever lies upon a layer has the layer's short name in its file `lower`, and while it is mounted
in the mount's options. The files tell of containers that are stopped, too; the mounts of those in
graph roots that we have never heard of.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from snapshotter.mounts.errors import MountError
from snapshotter.mounts.table import parse_mountinfo
from snapshotter.podman.graph_root import DRIVER

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator


class _Record(msgspec.Struct):
    """A container or an image."""

    layer: str = ""
    names: list[str] | None = None


def users_of(link: str, graph_roots: Iterable[Path]) -> list[str]:
    """Words for each user of the layer with this short name, such as `container web`. Blocks."""
    found: dict[str, None] = {}
    known: set[bytes] = set()
    for root in graph_roots:
        for layer in _layers_upon(link, root):
            known.add(os.fsencode(root / DRIVER / layer / "merged"))
            found[_name_of(layer, root)] = None
    for points in _mounts_of(link):
        if known.isdisjoint(points):
            found[f"the mount at {os.fsdecode(min(points))}"] = None
    return list(found)


def images_of(layers: Collection[str], graph_roots: Iterable[Path]) -> list[str]:
    """Words for each image of podman's own whose topmost layer is one of these, by ID: it has been
    pulled when the layer was there already. Blocks."""
    found = []
    for root in graph_roots:
        path = root / f"{DRIVER}-images/images.json"
        try:
            records = msgspec.json.decode(path.read_bytes(), type=list[_Record])
        except (OSError, msgspec.DecodeError, UnicodeDecodeError):
            continue
        found += [
            f"image {(one.names or [one.layer[:12]])[0]}" for one in records if one.layer in layers
        ]
    return found


def _layers_upon(link: str, root: Path) -> Iterator[str]:
    """The IDs of the layers of a graph root that have the short name below them."""
    wanted = f"l/{link}"
    for lower in (root / DRIVER).glob("*/lower"):
        try:
            below = lower.read_text().split(":")
        except OSError:  # removed meanwhile
            continue
        if wanted in below:
            yield lower.parent.name


def _name_of(layer: str, root: Path) -> str:
    for kind in ("container", "image"):
        for path in (root / f"{DRIVER}-{kind}s").glob("*.json"):  # some are named volatile-
            try:
                records = msgspec.json.decode(path.read_bytes(), type=list[_Record])
            except (OSError, msgspec.DecodeError, UnicodeDecodeError):
                continue
            for record in records:
                if record.layer == layer:
                    return f"{kind} {(record.names or [layer[:12]])[0]}"
    return f"layer {layer[:12]}"


def _mounts_of(link: str) -> Iterable[set[bytes]]:
    """Where each overlay upon the layer is mounted, in any mount namespace of the machine. (A
    container has it at "/".)"""
    wanted = f"l/{link}".encode()
    seen: set[str] = set()
    found: dict[tuple[int, int], set[bytes]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            namespace = _namespace(folder)
            if namespace in seen:
                continue
            seen.add(namespace)
            table = parse_mountinfo((folder / "mountinfo").read_bytes())
        except (OSError, MountError):  # it has ended
            continue
        for entry in table:
            if entry.kind == b"overlay" and any(wanted in one for one in entry.super_options):
                found.setdefault(entry.device, set()).add(entry.point)
    return found.values()


def _namespace(process: Path) -> str:
    """A name for the mount namespace of a process; a service that may not know takes each process
    for one of its own."""
    try:
        return os.readlink(process / "ns/mnt")
    except PermissionError:
        return process.name


def layers_below(store: Path, graph_roots: Iterable[Path]) -> set[str]:
    """The digests of an image's layers that podman has from a layer store; `store` is the image's
    directory in it. Blocks."""
    found = set()
    for root in graph_roots:
        for diff in (root / DRIVER).glob("*/diff"):
            try:
                target = Path(os.readlink(diff))
            except OSError:  # not a link: podman has it itself
                continue
            if target.parent.parent == store:
                found.add(target.parent.name)
    return found
