"""Looks at the node."""

from __future__ import annotations

import glob
import os
import platform
import stat
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from snapshotter.doctor import calls
from snapshotter.doctor.calls import CallError
from snapshotter.doctor.containerd import Facts
from snapshotter.doctor.running import Socket
from snapshotter.doctor.versions import Version
from snapshotter.doctor.wire import WireError
from snapshotter.mounts.errors import MountError
from snapshotter.mounts.syscalls import MountFlag, mount, unmount

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from snapshotter.doctor.recommended import Expected
    from snapshotter.doctor.running import Plugin, Served

FUSE = Path("/dev/fuse")
"""Where file systems are served."""

_PROGRAM_SECONDS = 10.0
_MAX_FILE = 16 << 20  # bytes; no configuration is as large


class LocalFiles:
    """Files of this machine."""

    def read(self, path: Path) -> bytes:
        with path.open("rb") as file:
            return file.read(_MAX_FILE)

    def glob(self, pattern: Path) -> Iterable[Path]:
        return map(Path, sorted(glob.glob(str(pattern))))  # Path.glob takes no absolute pattern


def collect(expected: Expected, containerd: Path, served: Served | str) -> Facts:
    """Everything but `served`, which is the daemon's own account, or why there is none."""
    is_root = os.geteuid() == 0
    return Facts(
        containerd=_containerd_version(containerd),
        kernel=Version.find(platform.release()),
        plugins=_plugins(containerd),
        socket=_socket(expected.address),
        answer_failure=_answer_failure(expected.address),
        fuse=is_device(FUSE),
        overlay_failure=try_overlay(existing(expected.root)) if is_root else None,
        overlay_tried=is_root,
        served=served,
    )


def try_overlay(directory: Path) -> str | None:
    """Mount an overlayfs with all of it below `directory`; tells why that fails, if it does."""
    try:
        with tempfile.TemporaryDirectory(prefix=".firstbyte-doctor-", dir=directory) as made:
            base = Path(made)
            lower, upper, work, merged = (
                base / name for name in ("lower", "upper", "work", "merged")
            )
            for one in (lower, upper, work, merged):
                one.mkdir()
            options = f"lowerdir={lower},upperdir={upper},workdir={work}"
            mount("overlay", merged, "overlay", MountFlag(0), options)
            try:
                (merged / "file").touch()
            finally:
                unmount(merged)
    except MountError as error:
        return str(error)
    except OSError as error:
        return error.strerror or str(error)
    return None


def _containerd_version(address: Path) -> Version | str:
    """That of the one that runs, else of the program."""
    try:
        if found := Version.find(calls.containerd_version(address)):
            return found
    except (CallError, WireError) as error:
        not_running = f"none answers at {address} ({error})"
    else:
        not_running = f"the one at {address} does not tell its version"
    try:
        done = subprocess.run(
            ["containerd", "--version"],
            capture_output=True,
            text=True,
            timeout=_PROGRAM_SECONDS,
            check=False,
        )
    except (OSError, subprocess.SubprocessError):
        return f"{not_running}, and there is no program containerd"
    return Version.find(done.stdout) or f"{not_running}, and the program tells no version"


def _plugins(address: Path) -> Sequence[Plugin] | str:
    try:
        return calls.containerd_plugins(address)
    except (CallError, WireError) as error:
        return f"no answer from containerd at {address} ({error})"


def _answer_failure(address: Path) -> str | None:
    try:
        calls.list_snapshots(address)
    except CallError as error:
        return str(error)
    return None


def _socket(path: Path) -> Socket | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return Socket(found.st_mode, found.st_uid)


def is_device(path: Path) -> bool:
    """Whether a character device is there."""
    try:
        return stat.S_ISCHR(path.stat().st_mode)
    except OSError:
        return False


def existing(path: Path) -> Path:
    """The directory itself, or the nearest one above that exists: the same file system."""
    while not path.is_dir() and path != path.parent:
        path = path.parent
    return path
