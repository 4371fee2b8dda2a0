"""A user without privileges, with a podman and a FirstByte of their own.

The user is one in a mount namespace alone: there /etc has an overlay that knows the user, and
/dev/fuse may be opened by everybody, as where udev runs. Nothing of it is left on the machine.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.support.instance import greeter, wait_until
from tests.support.podman import Podman
from tests.support.versions import REPOSITORY

if TYPE_CHECKING:
    from collections.abc import Iterator

_ID = 29_671  # of user and group; the subordinate ones follow
_FIRST, _COUNT = 400_000, 65_536

# The program is bound to where the user can reach it, whoever owns the directories above it.
_ENTER = f"""
set -e
base=$1 program=$2 python=$3
mount -t tmpfs -o mode=755 tmpfs "$base/own"
cd "$base/own"
mkdir upper work program python
mount -t overlay overlay -o "lowerdir=/etc,upperdir=$base/own/upper,workdir=$base/own/work" /etc
echo "somebody:x:{_ID}:{_ID}::$base/home:/bin/sh" >>/etc/passwd
echo "somebody:x:{_ID}:" >>/etc/group
echo "somebody:{_FIRST}:{_COUNT}" >/etc/subuid
echo "somebody:{_FIRST}:{_COUNT}" >/etc/subgid
mknod -m 666 fuse c 10 229
mount --bind fuse /dev/fuse
mount --rbind "$program" program
mount --rbind "$python" python
echo entered
read -r _  # until whoever started this closes the pipe, or ends
"""


class Somebody:
    """The user. `home` is an own directory; podman's storage is below it."""

    def __init__(self, base: Path, pid: int, registry: str) -> None:
        self.base = base
        self.home = base / "home"
        self.root = self.home / ".local/share/firstbyte"
        self.started: list[subprocess.Popen[bytes]] = []
        self.environment = {
            "HOME": str(self.home),
            "USER": "somebody",
            "PATH": "/usr/bin:/bin:/usr/sbin:/sbin",
            "PYTHONPATH": str(base / "own/program"),
            "PYTHONDONTWRITEBYTECODE": "1",
            "XDG_RUNTIME_DIR": str(base / "run"),
        }
        self.enter = ("nsenter", f"--mount=/proc/{pid}/ns/mnt", "--")
        self._prefix = (*self.enter, *become_somebody())
        self.podman = _UsersPodman("4.3", self.home, self._prefix, self.environment)
        containers = self.home / ".config/containers"
        containers.mkdir(parents=True)
        (self.home / "tmp").mkdir()
        (containers / "registries.conf").write_text(
            f'[[registry]]\nlocation = "{registry}"\ninsecure = true\n'
        )
        (containers / "storage.conf").symlink_to(self.home / "storage.conf")
        self.podman.configure(
            additionalimagestores=[self.root / "podman/images"],
            additionallayerstores=[f"{self.root}/podman/layers:ref"],
        )
        give_to_somebody(self.home, *self.home.rglob("*"))

    @property
    def program(self) -> list[str]:
        """`firstbyte`, where the user finds it."""
        python = self.base / "own/python/bin/python"
        return [str(python), "-m", "snapshotter.cli.main"]

    def command(self, *arguments: str | Path) -> list[str]:
        return [*self._prefix, *self.program, *map(str, arguments)]

    def run(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*arguments),
            env=self.environment,
            cwd="/",
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def succeed(self, *arguments: str | Path) -> str:
        done = self.run(*arguments)
        assert done.returncode == 0, done.stderr + self.log()
        return done.stdout

    def fail(self, *arguments: str | Path) -> str:
        """The one line that says why a command failed."""
        done = self.run(*arguments)
        assert done.returncode != 0
        (line,) = done.stderr.strip().splitlines()
        assert line.startswith("firstbyte: ")
        return line

    def unshare(self, *arguments: str | Path, given: str = "") -> subprocess.CompletedProcess[str]:
        """`firstbyte` in `podman unshare`, with this on standard input."""
        command = self.command(*arguments)
        place = len(self._prefix)
        return subprocess.run(
            [*command[:place], "podman", "unshare", *command[place:]],
            env=self.environment,
            cwd="/",
            input=given,
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )

    @property
    def daemon(self) -> int:
        """The process of the daemon."""
        return greeter(self.base / "run/firstbyte")

    def start(self, *options: str) -> subprocess.Popen[bytes]:
        """A daemon in the foreground that answers already."""
        with (self.base / "daemon.log").open("ab") as log:
            process = subprocess.Popen(
                self.command("daemon", *options),
                env=self.environment,
                cwd="/",
                stdout=subprocess.DEVNULL,
                stderr=log,
            )
        self.started.append(process)
        wait_until(lambda: process.poll() is not None or self.daemon == process.pid)
        assert process.poll() is None, self.log()
        return process

    def log(self) -> str:
        """What daemons said, those that were started for a command too."""
        paths = (self.base / "daemon.log", self.base / "run/firstbyte/daemon.log")
        return "".join(path.read_text() for path in paths if path.exists())

    def close(self) -> None:
        self.podman.run("rm", "-af", "-t", "0")
        for process in self.started:
            process.send_signal(signal.SIGINT)
            process.wait(timeout=30)
        self.podman.run("system", "migrate")  # ends the process that keeps the namespaces


def become_somebody() -> tuple[str, ...]:
    """What goes before a command to run it as the user."""
    return ("setpriv", f"--reuid={_ID}", f"--regid={_ID}", "--clear-groups", "--")


def give_to_somebody(*paths: Path) -> None:
    for path in paths:
        os.chown(path, _ID, _ID, follow_symlinks=False)


class _UsersPodman(Podman):
    """With what the user's podman finds by itself, and nothing from outside."""

    def __init__(
        self, version: Any, base: Path, prefix: tuple[str, ...], environment: dict[str, str]
    ) -> None:
        super().__init__(version, base, prefix)
        self._own = environment

    def environment(self) -> dict[str, str]:
        return self._own | {"TMPDIR": str(self.base / "tmp")}


@contextmanager
def somebody(registry: str) -> Iterator[Somebody]:
    """A user whose podman may speak HTTP with the registry; afterwards nothing is left."""
    with ExitStack() as stack:
        base = Path(tempfile.mkdtemp(prefix="fb-"))
        stack.callback(shutil.rmtree, base)
        base.chmod(0o755)
        for name, mode in (("own", 0o755), ("home", 0o755), ("run", 0o700)):
            (base / name).mkdir(mode=mode)
            os.chown(base / name, _ID, _ID)
        process = stack.enter_context(
            subprocess.Popen(
                [
                    *("unshare", "--mount", "--propagation", "private"),
                    *("sh", "-c", _ENTER, "sh", base, REPOSITORY, sys.prefix),
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
        stack.callback(process.kill)
        assert process.stdout
        assert process.stderr
        assert process.stdout.readline() == "entered\n", process.stderr.read()
        made = Somebody(base, process.pid, registry)
        stack.callback(made.close)
        yield made
