"""The kernel's mount calls, with errors that say what to do.

The `mount` program is not used: it needs loop devices for files, reads fstab, and its errors are
text. mount(2) and umount2(2) are libc's; the calls for trees that are mounted nowhere yet
(open_tree(2), fsopen(2) and their kin) go by number, because glibc has them only since 2.36. ctypes
releases the GIL around every call, which matters because a mount operation on our own file system
makes the kernel ask this very process (call these functions from worker threads).
"""

from __future__ import annotations

import ctypes
import enum
import errno
import os
import struct
from typing import TYPE_CHECKING

from snapshotter.mounts.errors import MountBusyError, MountError, MountPointError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable
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
_libc.syscall.restype = ctypes.c_long

# One number on x86_64, aarch64 and all others but alpha (asm-generic/unistd.h).
_OPEN_TREE = 428  # Linux 5.2
_MOVE_MOUNT = 429  # Linux 5.2
_FSOPEN = 430  # Linux 5.2
_FSCONFIG = 431  # Linux 5.2
_FSMOUNT = 432  # Linux 5.2
_MOUNT_SETATTR = 442  # Linux 5.12

# fcntl.h
_AT_FDCWD = -100
_AT_EMPTY_PATH = 0x1000

# linux/mount.h
_OPEN_TREE_CLONE = 1
_OPEN_TREE_CLOEXEC = os.O_CLOEXEC
_MOVE_MOUNT_F_EMPTY_PATH = 4
_FSOPEN_CLOEXEC = 1
_FSCONFIG_SET_FLAG = 0
_FSCONFIG_SET_STRING = 1
_FSCONFIG_CMD_CREATE = 6
_FSMOUNT_CLOEXEC = 1
_MOUNT_ATTR_RDONLY = 1
_MOUNT_ATTR_IDMAP = 0x0010_0000

OPTION_MAX = 255
"""Bytes that the value of an option of `new_tree` can have: fsconfig(2) takes 256 with the NUL."""

_LOG_LINE = 4096  # more than the kernel puts into a line of a context's log

# struct mount_attr: attr_set, attr_clr, propagation, userns_fd
_MOUNT_ATTR = struct.Struct("=QQQQ")


class MountFlag(enum.IntFlag):
    """Flags of mount(2), from the kernel's include/uapi/linux/mount.h."""

    READ_ONLY = 1 << 0
    NO_DEVICES = 1 << 2
    REMOUNT = 1 << 5
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


def bind_writable(source: Path, mountpoint: Path, target: Path) -> None:
    """Show a directory of the file system mounted at `mountpoint`, which stays read-only itself, at
    `target`, where its server is asked about changes.
    """
    _mount("change", "", mountpoint, "", MountFlag.REMOUNT, "")  # all of the file system
    alone = MountFlag.REMOUNT | MountFlag.BIND
    _mount("change", "", mountpoint, "", alone | MountFlag.READ_ONLY, "")
    bind(source, target)
    _mount("change", "", target, "", alone, "")


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


def clone_tree(source: Path) -> int:
    """A copy of the mount that shows `source`, from `source` on, that is mounted nowhere.

    What is mounted below `source` is not part of it. Returns a descriptor (close-on-exec): the copy
    goes with it, unless `attach` has given it a place. Raises MountError.
    """
    flags = _OPEN_TREE_CLONE | _OPEN_TREE_CLOEXEC
    return _call("copy the mount of", source, _OPEN_TREE, _AT_FDCWD, os.fsencode(source), flags)


def new_tree(
    kind: str, options: Iterable[tuple[str, str | Path]], flags: Collection[str] = ()
) -> int:
    """Make a file system of type `kind` that is mounted nowhere.

    Unlike the options of `mount`, these may be many: each is handed over by itself, `source` among
    them; `flags` are options without a value. The mount of a file system that is "ro" is read-only,
    too. Returns a descriptor (close-on-exec) as `clone_tree` does. Raises MountError, in the
    kernel's own words where it gives some.
    """
    context = _syscall(_FSOPEN, kind.encode(), _FSOPEN_CLOEXEC)
    if context < 0:
        raise _explain("make", kind, kind, ctypes.get_errno())
    try:
        for key, value in options:
            option = (key.encode(), os.fsencode(value))
            if _syscall(_FSCONFIG, context, _FSCONFIG_SET_STRING, *option, 0) < 0:
                raise _refused(context, kind, f" with {key}={value}")
        for flag in flags:
            if _syscall(_FSCONFIG, context, _FSCONFIG_SET_FLAG, flag.encode(), None, 0) < 0:
                raise _refused(context, kind, f" with {flag}")
        if _syscall(_FSCONFIG, context, _FSCONFIG_CMD_CREATE, None, None, 0) < 0:
            raise _refused(context, kind, "")
        attributes = _MOUNT_ATTR_RDONLY if "ro" in flags else 0
        tree = _syscall(_FSMOUNT, context, _FSMOUNT_CLOEXEC, attributes)
        if tree < 0:
            raise _refused(context, kind, "")
        return tree
    finally:
        os.close(context)


def set_idmap(tree: int, namespace: int, source: Path) -> None:
    """Show the owners of files in a detached tree as a user namespace maps them.

    A file that the file system says is owned by an id of the namespace is shown with the id that
    this is outside; ids that the namespace does not map are shown as nobody. `namespace` is a
    descriptor of a user namespace with a mapping; `source` names the tree in errors.

    Raises MountError, with `errno` EINVAL if the file system cannot have it.
    """
    attributes = _MOUNT_ATTR.pack(_MOUNT_ATTR_IDMAP, 0, 0, namespace)
    arguments = (tree, b"", _AT_EMPTY_PATH, attributes, len(attributes))
    _call("map the owners of", source, _MOUNT_SETATTR, *arguments)


def attach(tree: int, target: Path) -> None:
    """Mount a detached tree at `target`; raises MountError."""
    arguments = (tree, b"", _AT_FDCWD, os.fsencode(target), _MOVE_MOUNT_F_EMPTY_PATH)
    _call("mount at", target, _MOVE_MOUNT, *arguments)


def _call(what: str, path: Path, number: int, *arguments: int | bytes) -> int:
    result = _syscall(number, *arguments)
    if result < 0:
        raise _explain(what, path, "", ctypes.get_errno())
    return result


def _syscall(number: int, *arguments: int | bytes | None) -> int:
    """A system call by number; whole registers, because a variadic function is not told types.

    Negative if it failed, and then ctypes has the errno.
    """
    words = [
        ctypes.c_long(word) if isinstance(word, int) else ctypes.c_char_p(word)
        for word in arguments
    ]
    result: int = _libc.syscall(ctypes.c_long(number), *words)
    return result


def _refused(context: int, kind: str, option: str) -> MountError:
    """Why a context of fsopen(2) refused what the last call asked for."""
    number = ctypes.get_errno()
    if number == errno.EPERM:
        return _explain("make", kind, kind, number)
    said = _read_log(context) or os.strerror(number)
    return MountError(f"the kernel makes no {kind}{option}: {said}", errno=number)


def _read_log(context: int) -> str:
    """The errors in a context's log, which has a line a read, each with its level: "e …"."""
    lines = []
    try:
        while line := os.read(context, _LOG_LINE):
            level, _, text = line.decode(errors="replace").strip().partition(" ")
            if level == "e":
                lines.append(text)
    except OSError:  # ENODATA: that was all
        pass
    return "; ".join(lines)


def _mount(what: str, source: str, target: Path, kind: str, flags: MountFlag, options: str) -> None:
    arguments = (os.fsencode(source), os.fsencode(target), kind.encode())
    if _libc.mount(*arguments, int(flags), options.encode()):
        raise _explain(what, target, kind, ctypes.get_errno())


def _explain(what: str, target: Path | str, kind: str, number: int) -> MountError:
    if number in (errno.EPERM, errno.EACCES):
        # Root of a user namespace may mount some file systems, and nothing that reads disks.
        hint = "run this as root" if os.geteuid() else "that takes the machine's root"
        return MountError(f"no permission to {what} {target}", hint=hint, errno=number)
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
    if number == errno.ENOSYS:
        return MountError(
            f"this kernel cannot {what} {target}", hint="Linux 5.12 or newer can", errno=number
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
