"""The mounts that show a snapshot: what containerd's overlayfs snapshotter would answer.

From containerd's plugins/snapshots/overlay/overlay.go and overlayutils/check.go. Only id mappings
are not left to containerd: see `idmapped`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from snapshotter.containerd.errors import InvalidArgumentError
from snapshotter.containerd.labels import GID_MAPPING, UID_MAPPING
from snapshotter.containerd.snapshots import Kind, Mount
from snapshotter.mounts.idmap import IdMapping
from snapshotter.store.errors import StoreError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_SPECIAL = frozenset(":,\\")  # in the option lowerdir= they separate paths, options, and escape
_ALL_IDS = ["0", "0", "4294967295"]  # uid_map of the initial user namespace
_NO_ID = 2**32 - 1
_EVERY_ID = (0, 0, _NO_ID)


def check_path(path: Path) -> None:
    """Refuse a directory that cannot stand in overlay's options. Raises StoreError.

    The kernel knows escapes for these characters, but containerd and runtimes split options at
    commas whatever stands before them.
    """
    if special := _SPECIAL.intersection(os.fspath(path)):
        found = " ".join(sorted(special))
        raise StoreError(
            f"{path} cannot be used for overlay mounts: it has {found} in its name",
            hint="choose another directory",
        )


def kernel_options() -> tuple[str, ...]:
    """Options that every overlay of this machine needs."""
    options = []
    if _in_user_namespace():
        # Only there: trusted.overlay.* attributes need the real root. Kernels before 5.11 refuse
        # the option, and with few exceptions refuse overlay in user namespaces altogether.
        options.append("userxattr")
    if Path("/sys/module/overlay/parameters/index").exists():
        # With the index, an upper directory that is mounted twice is an error.
        options.append("index=off")
    return tuple(options)


def overlay_mounts(
    kind: Kind,
    directory: Path,
    lowers: Sequence[Path],
    options: Sequence[str],
) -> tuple[Mount, ...]:
    """The mounts of an active snapshot or a view.

    `directory` is the snapshot's own, `lowers` are what it stands on, nearest first, and `options`
    are of `kernel_options`. A view is never writable.
    """
    if not lowers:
        access = "rw" if kind is Kind.ACTIVE else "ro"
        return (Mount("bind", os.fspath(directory / "fs"), (access, "rbind")),)
    if kind is not Kind.ACTIVE and len(lowers) == 1:
        return (Mount("bind", os.fspath(lowers[0]), ("ro", "rbind")),)
    own: tuple[str, ...] = ()
    if kind is Kind.ACTIVE:
        own = (f"workdir={directory / 'work'}", f"upperdir={directory / 'fs'}")
    lower = "lowerdir=" + ":".join(os.fspath(path) for path in lowers)
    return (Mount("overlay", "overlay", (*own, lower, *options)),)


def id_mapping(labels: Mapping[str, str]) -> IdMapping | None:
    """How ids of the snapshot's container are mapped, None if they are not.

    Raises InvalidArgumentError for mappings that make no sense or have no root.
    """
    uids, gids = labels.get(UID_MAPPING, ""), labels.get(GID_MAPPING, "")
    return IdMapping(_ranges(uids), _ranges(gids)) if uids or gids else None


def root_of(mapping: IdMapping) -> tuple[int, int]:
    """The (uid, gid) that root of the container is outside."""
    user, group = (
        next(outside for inside, outside, _ in ranges if inside == 0)
        for ranges in (mapping.users, mapping.groups)
    )
    return user, group


def _ranges(mapping: str) -> list[tuple[int, int, int]]:
    """What "container:host:size,..." says; nothing at all maps every id to itself."""
    if not mapping:
        return [_EVERY_ID]
    ranges = []
    for entry in mapping.split(","):
        try:
            inside, outside, size = (_to_id(number) for number in entry.split(":"))
        except ValueError as error:
            raise InvalidArgumentError(f"{mapping!r} is no mapping of user or group ids") from error
        ranges.append((inside, outside, size))
    if not any(inside == 0 and size > 0 for inside, _, size in ranges):
        raise InvalidArgumentError(f"the mapping {mapping!r} has no root")
    return ranges


def _to_id(text: str) -> int:
    if not (text.isascii() and text.isdigit()) or len(text) > 10 or int(text) >= _NO_ID:
        raise ValueError(text)
    return int(text)


def _in_user_namespace() -> bool:
    return Path("/proc/self/uid_map").read_text().split() != _ALL_IDS
