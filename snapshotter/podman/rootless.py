"""podman without root: the namespaces that it works in, and the directories that it uses.

What a user's podman mounts is in one mount namespace, in a user namespace in which the user is
root; all of the user's podmans join both. A mount that they are to see has to be made in there.
`podman unshare` runs a program in there, and its environment tells that it is so. Source: podman
`pkg/rootless`, `cmd/podman/system/unshare.go`; containers/storage `pkg/unshare`.
"""

from __future__ import annotations

import os
import select
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from index.errors import FirstByteError

_USER = "_CONTAINERS_ROOTLESS_UID"  # what podman tells those that it runs in there
_IDENTITY = ["0", "0", "4294967295"]
_PAUSE = "libpod/tmp/pause.pid"  # tells the process that keeps the namespaces

# Told by its process number, it waits until whoever has started it is done.
_WAITER = ("podman", "unshare", "sh", "-c", "echo $$; read -r _")
_SECONDS = 30.0  # it takes 0.2 s


class RootlessError(FirstByteError):
    """podman cannot be used without root here."""


@dataclass(frozen=True)
class User:
    """The user of podman without root, and where that user's programs keep things.

    `data` and `config` are as in the XDG Base Directory Specification; `runtime` is what podman
    falls back to where no login has made one.
    """

    uid: int
    data: Path
    config: Path
    runtime: Path

    @property
    def graph_root(self) -> Path:
        """Where podman keeps images and containers, unless it is configured."""
        return self.data / "containers/storage"


def user() -> User | None:
    """The user whom this process works for, in podman's namespaces or outside of them; None if it
    is root."""
    uid = os.geteuid()
    if uid == 0:
        told = os.environ.get(_USER, "")
        if not told.isdecimal() or _is_real_root():
            return None
        uid = int(told)
    home = Path.home()
    return User(
        uid,
        data=_directory("XDG_DATA_HOME") or home / ".local/share",
        config=_directory("XDG_CONFIG_HOME") or home / ".config",
        runtime=_directory("XDG_RUNTIME_DIR") or Path(f"/run/user/{uid}"),
    )


def how_to_start() -> str:
    """What starts the daemon that is meant, for a hint."""
    return f"systemctl {'--user ' if user() else ''}start firstbyte, or firstbyte daemon"


def is_outside() -> bool:
    """Whether this process is a user's, and not in podman's namespaces."""
    return os.geteuid() != 0


def enter() -> NoReturn:
    """Run this command again in podman's namespaces, in the place of this process.

    A process of its own would keep signals and a service manager's messages from the command.
    Raises RootlessError.
    """
    namespaces = _pause_namespaces() or _new_namespaces()
    options = [
        f"--{option}=/proc/self/fd/{descriptor}"
        for option, descriptor in zip(("user", "mount"), namespaces, strict=True)
    ]
    for descriptor in namespaces:
        os.set_inheritable(descriptor, True)
    words = ["nsenter", *options, "--preserve-credentials", f"--wdns={os.getcwd()}"]
    told = {
        "_CONTAINERS_USERNS_CONFIGURED": "done",
        _USER: str(os.geteuid()),
        "_CONTAINERS_ROOTLESS_GID": str(os.getegid()),
    }
    try:
        command = [*words, sys.executable, *sys.orig_argv[1:]]
        os.execvpe(words[0], command, os.environ | told)  # noqa: S606
    except OSError as error:
        raise RootlessError(
            f"cannot run nsenter: {error.strerror}", hint="install util-linux"
        ) from error


def is_same_namespace(pid: int) -> bool:
    """Whether a process, of the same user, has the mounts that this one has."""
    try:
        return os.stat(f"/proc/{pid}/ns/mnt") == os.stat("/proc/self/ns/mnt")
    except OSError:
        return False


def mapped_ids() -> int:
    """How many user IDs there are in this user namespace."""
    lines = Path("/proc/self/uid_map").read_text().splitlines()
    return sum(int(line.split()[2]) for line in lines)


def _is_real_root() -> bool:
    return Path("/proc/self/uid_map").read_text().split() == _IDENTITY


def _directory(variable: str) -> Path | None:
    value = os.environ.get(variable, "")
    return Path(value) if value.startswith("/") else None


def _pause_namespaces() -> tuple[int, int] | None:
    """Descriptors of the user and the mount namespace that podman keeps; None if it keeps none.

    podman itself is not asked: it looks at its stores before anything else, and if ours is mounted
    and its daemon dead it waits for the daemon that is about to be started here.
    """
    user_ = user()
    assert user_
    try:
        pid = int((user_.runtime / _PAUSE).read_text())
        descriptors = _open_namespaces(pid)
    except (OSError, ValueError):  # there is none, or it has ended
        return None
    if os.path.samestat(os.stat(descriptors[0]), os.stat("/proc/self/ns/user")):
        for descriptor in descriptors:  # another process has its number
            os.close(descriptor)
        return None
    return descriptors


def _new_namespaces() -> tuple[int, int]:
    """As `_pause_namespaces`, from podman, which keeps them from now on. Raises RootlessError."""
    with ExitStack() as stack:
        try:
            waiter = stack.enter_context(
                subprocess.Popen(
                    _WAITER, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
                )
            )
        except FileNotFoundError as error:
            raise RootlessError(
                "images are mounted by root, or for a user's podman, and there is no podman",
                hint="use sudo, or install podman",
            ) from error
        except OSError as error:
            raise RootlessError(f"cannot run podman: {error.strerror}") from error
        stack.callback(waiter.kill)
        assert waiter.stdout
        if not select.select([waiter.stdout], [], [], _SECONDS)[0]:
            raise RootlessError(f"podman unshare does not answer within {_SECONDS:.0f} seconds")
        told = waiter.stdout.readline().strip()
        if not told.isdigit():
            raise RootlessError(
                f"podman cannot run without root here: {_last_words(waiter)}",
                hint="use sudo, or see podman(1) on rootless mode",
            )
        try:
            return _open_namespaces(int(told))
        except OSError as error:
            raise RootlessError(f"cannot enter podman's namespaces: {error.strerror}") from error


def _last_words(process: subprocess.Popen[bytes]) -> str:
    assert process.stderr
    lines = process.stderr.read().decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else "podman unshare fails"


def _open_namespaces(pid: int) -> tuple[int, int]:
    user_namespace = os.open(f"/proc/{pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return user_namespace, os.open(f"/proc/{pid}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        os.close(user_namespace)
        raise
