"""Idmapped mounts: directories as containers in user namespaces have them.

Such a mount is a copy of another one, in which files' owners are shifted into a user namespace
(mount_setattr(2) with MOUNT_ATTR_IDMAP). Not every file system can be shown so, and no table tells
which: the kernel is asked.
"""

from __future__ import annotations

import errno
import os
import select
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from snapshotter.mounts import syscalls
from snapshotter.mounts.errors import MountError
from snapshotter.mounts.table import read_mounts

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_CHILD_SECONDS = 10.0

# Only a process of its own can enter a user namespace, because one with threads may not. It is
# another Python and no fork of this one: a fork takes other threads' locks along. It says "0" or
# an errno, and ends when its input does, so it outlives nobody.
_CHILD = """\
import ctypes, sys
libc = ctypes.CDLL(None, use_errno=True)
failed = libc.unshare(0x10000000)  # CLONE_NEWUSER
print(ctypes.get_errno() if failed else 0, flush=True)
sys.stdin.read()
"""


@dataclass(frozen=True, slots=True)
class IdMapping:
    """Which ids inside of a user namespace are which outside: ranges (inside, outside, count)."""

    users: Sequence[tuple[int, int, int]]
    groups: Sequence[tuple[int, int, int]]


_ROOT_ALONE = IdMapping([(0, 0, 1)], [(0, 0, 1)])


@dataclass(frozen=True, slots=True)
class IdmapSupport:
    """Whether there can be idmapped copies of a directory's mount; true or false as itself.

    `reason` says in one line why not, and is empty if there can.
    """

    reason: str

    def __bool__(self) -> bool:
        return not self.reason


def can_idmap(directory: Path) -> IdmapSupport:
    """Try it with a copy of the mount that nobody sees, and that is gone afterwards.

    Starts a short-lived process, and may look `directory` up in its file system: call this from a
    worker thread. Needs root; whatever stands in the way becomes the reason.
    """
    try:
        with user_namespace(_ROOT_ALONE) as namespace:
            os.close(clone_idmapped(directory, namespace))
    except MountError as error:
        return IdmapSupport(str(error))
    return IdmapSupport("")


def clone_idmapped(directory: Path, namespace: int) -> int:
    """A copy of the mount that shows `directory`, as `syscalls.clone_tree` makes it, with owners
    as the user namespace (a descriptor) maps them.

    Raises MountError, with `errno` EINVAL if the file system cannot be shown so.
    """
    tree = syscalls.clone_tree(directory)
    try:
        syscalls.set_idmap(tree, namespace, directory)
    except MountError as error:
        os.close(tree)
        if error.errno == errno.EINVAL:
            raise MountError(_refusal(directory), errno=errno.EINVAL) from error
        raise
    return tree


@contextmanager
def user_namespace(mapping: IdMapping) -> Iterator[int]:
    """A new user namespace with this mapping.

    Gives a descriptor (close-on-exec) for as long as the block lasts; no process stays in the
    namespace. Raises MountError.
    """
    namespace = _make_user_namespace(mapping)
    try:
        yield namespace
    finally:
        os.close(namespace)


def _make_user_namespace(mapping: IdMapping) -> int:
    # Isolated and without site: a third of the start-up time, and nobody's environment matters.
    command = [sys.executable, "-I", "-S", "-c", _CHILD]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        try:
            answer = _read_line(child)
            if answer != "0":
                reason = os.strerror(int(answer)) if answer.isdecimal() else "the process died"
                raise MountError(
                    f"no user namespace can be made: {reason}",
                    hint="see user.max_user_namespaces and the security modules' settings",
                )
            process = Path(f"/proc/{child.pid}")  # the number is the child's until it is waited for
            (process / "uid_map").write_text(_lines(mapping.users))
            (process / "gid_map").write_text(_lines(mapping.groups))
            return os.open(process / "ns" / "user", os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise MountError(
                f"no user namespace can be set up: {error.strerror}", hint="run this as root"
            ) from error
        finally:
            child.kill()


def _lines(ranges: Sequence[tuple[int, int, int]]) -> str:
    """As user_namespaces(7) has them."""
    return "".join(f"{inside} {outside} {count}\n" for inside, outside, count in ranges)


def _read_line(child: subprocess.Popen[bytes]) -> str:
    assert child.stdout is not None
    poll = select.poll()
    poll.register(child.stdout, select.POLLIN)
    if not poll.poll(_CHILD_SECONDS * 1000):
        raise MountError(f"no user namespace was made in {_CHILD_SECONDS:g} s")
    return child.stdout.readline().decode().strip()  # the child writes it in one piece


def _refusal(directory: Path) -> str:
    kind = _kind_of(directory)
    reason = f"Linux {os.uname().release} does not idmap this {kind} file system"
    if kind.partition(".")[0] == "fuse":
        reason += " (FUSE can be idmapped since 6.12, if the server allows it)"
    return reason


def _kind_of(directory: Path) -> str:
    """The type of the file system of `directory`, as the mount table has it."""
    descriptor = os.open(directory, os.O_PATH | os.O_CLOEXEC)
    try:
        information = Path(f"/proc/self/fdinfo/{descriptor}").read_text()  # proc_pid_fdinfo(5)
    finally:
        os.close(descriptor)
    lines = (line.split() for line in information.splitlines())
    mount_id = next(int(value) for name, value in lines if name == "mnt_id:")
    kinds = (entry.kind for entry in read_mounts() if entry.mount_id == mount_id)
    return os.fsdecode(next(kinds, b"unknown"))
