"""The mounts of this mount namespace, read from /proc/self/mountinfo (proc_pid_mountinfo(5)).

Reading the table asks no file system anything, so it works for mounts whose server is dead.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from snapshotter.mounts.errors import MountError

_ESCAPE = re.compile(rb"\\([0-3][0-7]{2})")
_SEPARATOR = b"-"  # ends the optional fields


@dataclass(frozen=True, slots=True)
class MountEntry:
    """One line of the table. Names are bytes as the kernel has them, escapes resolved.

    `root` is the directory of the file system that is shown at `point`; `device` is (major, minor).
    `optional` are fields such as b"shared:2"; a private mount has none.
    """

    mount_id: int
    parent_id: int
    device: tuple[int, int]
    root: bytes
    point: bytes
    options: tuple[bytes, ...]
    optional: tuple[bytes, ...]
    kind: bytes
    source: bytes
    super_options: tuple[bytes, ...]


def parse_mountinfo(data: bytes) -> list[MountEntry]:
    """All mounts, in the order of the table: later ones may lie on top of earlier ones.

    Raises MountError for text that is no mount table.
    """
    return [_parse_line(line) for line in data.split(b"\n") if line]


def read_mounts() -> list[MountEntry]:
    """The table of the calling process, now."""
    return parse_mountinfo(Path("/proc/self/mountinfo").read_bytes())


def mount_at(point: Path) -> MountEntry | None:
    """The topmost mount whose mount point is exactly `point` (an absolute path)."""
    wanted = os.fsencode(point)
    return next((entry for entry in reversed(read_mounts()) if entry.point == wanted), None)


def _parse_line(line: bytes) -> MountEntry:
    fields = line.split(b" ")
    try:
        end = fields.index(_SEPARATOR, 6)
        mount_id, parent_id, device, root, point, options = fields[:6]
        kind, source, super_options = fields[end + 1 :]
        major, minor = device.split(b":")
        return MountEntry(
            mount_id=int(mount_id),
            parent_id=int(parent_id),
            device=(int(major), int(minor)),
            root=_unescape(root),
            point=_unescape(point),
            options=tuple(options.split(b",")),
            optional=tuple(fields[6:end]),
            kind=_unescape(kind),
            source=_unescape(source),
            super_options=tuple(_unescape(super_options).split(b",")),
        )
    except ValueError as error:
        raise MountError(f"/proc/self/mountinfo has a line of another form: {line!r}") from error


def _unescape(field: bytes) -> bytes:
    """Resolve `\\ooo`: the kernel writes space, tab, newline and backslash so (mangle_path)."""
    return _ESCAPE.sub(lambda match: bytes((int(match[1], 8),)), field)
