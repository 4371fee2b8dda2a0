"""mount(2) and umount2(2) through libc, with errors that say what to do.

The `mount` program is not used: it needs loop devices for files, reads fstab, and its errors are
text. ctypes releases the GIL around every call, which matters because a mount operation on our own
file system makes the kernel ask this very process (call these functions from worker threads).
"""

from __future__ import annotations

import ctypes
import enum
import errno
import os
from typing import TYPE_CHECKING

from snapshotter.mounts.errors import MountBusyError, MountError, MountPointError

if TYPE_CHECKING:
    from pathlib import Path

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mount.argtypes = (
    ctypes.c_char_p,
    ctypes.c_char_p,
    ctypes.c_char_p,
    ctypes.c_ulong,
    ctypes.c_char_p,
)
_libc.umount2.argtypes = (ctypes.c_char_p, ctypes.c_int)


class MountFlag(enum.IntFlag):
    """Flags of mount(2), from the kernel's include/uapi/linux/mount.h."""

    READ_ONLY = 1 << 0
    NO_DEVICES = 1 << 2
    BIND = 1 << 12
    PRIVATE = 1 << 18


_DETACH = 2  # MNT_DETACH of umount2(2)
_NO_FOLLOW = 8  # UMOUNT_NOFOLLOW


def mount(source: str, target: Path, kind: str, flags: MountFlag, options: str = "") -> None:
    """Mount a file system of type `kind` at `target`; raises MountError."""
    _mount("mount", source, target, kind, flags, options)


def bind(source: Path, target: Path) -> None:
    """Show the tree at `source` at `target` too, with the flags of the mount it comes from.

    The new mount is private: what is mounted below it later stays in this mount namespace.
    """
    _mount("bind", str(source), target, "", MountFlag.BIND, "")
    make_private(target)


def make_private(target: Path) -> None:
    """Stop mounts below `target` from appearing in other mount namespaces, and theirs in ours."""
    _mount("change", "", target, "", MountFlag.PRIVATE, "")


def unmount(target: Path, *, detach: bool = False) -> None:
    """Remove the topmost mount at `target`.

    With `detach` it disappears from the tree at once even if it is in use, and goes for good with
    its last user. Raises MountBusyError if it is in use otherwise, MountPointError if nothing is
    mounted there.
    """
    flags = _NO_FOLLOW | (_DETACH if detach else 0)
    if _libc.umount2(os.fsencode(target), flags):
        raise _explain("unmount", target, "", ctypes.get_errno())


def _mount(what: str, source: str, target: Path, kind: str, flags: MountFlag, options: str) -> None:
    arguments = (os.fsencode(source), os.fsencode(target), kind.encode())
    if _libc.mount(*arguments, int(flags), options.encode()):
        raise _explain(what, target, kind, ctypes.get_errno())


def _explain(what: str, target: Path, kind: str, number: int) -> MountError:
    if number in (errno.EPERM, errno.EACCES):
        return MountError(
            f"no permission to {what} {target}", hint="run this as root", errno=number
        )
    if number == errno.EBUSY:
        return MountBusyError(
            f"{target} is in use",
            hint=f"end what uses it and try again (fuser -vm {target} lists it)",
            errno=number,
        )
    if number == errno.ENODEV and kind:
        module = kind.partition(".")[0]  # what follows the dot is for people alone
        return MountError(
            f"this kernel has no file system {module}",
            hint=f"load it: modprobe {module}",
            errno=number,
        )
    if what == "unmount" and number == errno.EINVAL:
        return MountPointError(f"nothing is mounted at {target}", errno=number)
    if number in (errno.ENOENT, errno.ENOTDIR):
        return MountPointError(
            f"cannot {what} {target}: {os.strerror(number)}",
            hint="make the directory first",
            errno=number,
        )
    return MountError(f"cannot {what} {target}: {os.strerror(number)}", errno=number)
