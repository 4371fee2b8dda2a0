"""An instance of FirstByte with directories of its own, driven as people drive it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from snapshotter.mounts import syscalls
from snapshotter.mounts.table import MountEntry, read_mounts

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

WAIT_SECONDS = 30
POLL_SECONDS = 0.02

_PROGRAM = (sys.executable, "-m", "snapshotter.cli.main")


def firstbyte(*arguments: str | Path) -> str:
    """What a command that uses no node's state prints; it must succeed."""
    done = subprocess.run(
        [*_PROGRAM, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


class Instance:
    """`base` holds root, state, and directories to mount on."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.root = base / "root"
        self.state = base / "state"
        self.mode = "auto"
        self.config = base / "config.toml"
        """Used if it is there."""
        self.environment: dict[str, str] = {}
        """Variables that commands get besides those that are set."""
        self.started: list[subprocess.Popen[bytes]] = []

    def command(self, *arguments: str | Path) -> list[str]:
        """The command line; options for the instance go last."""
        words = [str(argument) for argument in arguments]
        places = ["--root", str(self.root), "--state", str(self.state)]
        if self.config.exists():
            places += ["--config", str(self.config)]
        return [*_PROGRAM, *words, *places]

    def run(self, *arguments: str | Path, seconds: float = 60) -> subprocess.CompletedProcess[str]:
        """Run a command, which hangs if it takes longer."""
        return subprocess.run(
            self.command(*arguments),
            env=os.environ | self.environment,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )

    def succeed(self, *arguments: str | Path, seconds: float = 60) -> str:
        done = self.run(*arguments, seconds=seconds)
        assert done.returncode == 0, done.stderr + self.log()
        return done.stdout

    def fail(self, *arguments: str | Path) -> str:
        """The one line that says why a command failed, behind those on its progress if it took more
        than a second."""
        done = self.run(*arguments)
        assert done.returncode != 0
        *progress, line = done.stderr.strip().splitlines()
        assert [other for other in progress if " MB/s" not in other] == []
        assert line.startswith("firstbyte: ")
        return line

    def directory(self, name: str) -> Path:
        """A new directory to mount on."""
        path = self.base / name
        path.mkdir()
        return path

    @contextmanager
    def mounted(self, reference: str, *options: str, seconds: float = 60) -> Iterator[Path]:
        """An image's tree, for as long as the block runs."""
        target = self.directory("tree")
        mount = ("mount", reference, target, "--mode", self.mode, *options)
        self.succeed(*mount, seconds=seconds)
        try:
            yield target
        finally:
            self.succeed("umount", target)
            target.rmdir()

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.succeed("status", "--json"))
        return found

    def log(self) -> str:
        path = self.state / "daemon.log"
        return path.read_text() if path.exists() else ""

    def mounts(self) -> list[MountEntry]:
        """What of this instance is in the mount table."""
        prefix = os.fsencode(self.base) + b"/"
        return [entry for entry in read_mounts() if entry.point.startswith(prefix)]

    def start(self, *options: str) -> subprocess.Popen[bytes]:
        """A daemon in the foreground that answers already."""
        process = self.launch(*options)
        wait_until(lambda: process.poll() is not None or self.answers(process))
        return process

    def launch(self, *options: str, program: Sequence[str] = _PROGRAM) -> subprocess.Popen[bytes]:
        """As `start`, but it has only begun. `program` is another one to run."""
        self.state.mkdir(mode=0o700, exist_ok=True)
        with (self.state / "daemon.log").open("ab") as log:
            process = subprocess.Popen(
                [*program, *self.command("daemon", *options)[len(_PROGRAM) :]],
                env=os.environ | self.environment,
                stdout=subprocess.DEVNULL,
                stderr=log,
            )
        self.started.append(process)
        return process

    def answers(self, process: subprocess.Popen[bytes]) -> bool:
        """Whether it greets at the control socket. (`firstbyte status` takes 0.2 s of a core.)"""
        return greeter(self.state) == process.pid

    def holders(self) -> list[int]:
        """The processes that hold descriptors for this instance's daemons."""
        address = os.fsencode(self.state / "holder.sock")
        found = []
        for line in Path("/proc/net/unix").read_bytes().splitlines():
            if line.endswith(b" " + address):
                end = b"socket:[" + line.split()[6] + b"]"
                for folder in Path("/proc").glob("[0-9]*"):
                    with suppress(OSError):  # it has just ended
                        if any(_target(link) == end for link in (folder / "fd").iterdir()):
                            found.append(int(folder.name))
        return sorted(set(found) - {process.pid for process in self.started})

    def clean(self) -> None:
        """End and unmount whatever a failed test has left."""
        for process in self.started:
            if process.poll() is None:
                process.kill()
            process.communicate()
        for pid in [*self._daemons(), *self.holders()]:
            os.kill(pid, signal.SIGKILL)
        for entry in reversed(self.mounts()):
            syscalls.unmount(Path(os.fsdecode(entry.point)), detach=True)

    def _daemons(self) -> list[int]:
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                words = (folder / "cmdline").read_bytes().split(b"\0")
            except OSError:  # it has just ended
                continue
            mine = json.dumps(str(self.state)).encode()  # in its configuration
            if b"snapshotter.daemon" in words and any(mine in word for word in words):
                found.append(int(folder.name))
        return found

    def has_daemon(self) -> bool:
        return bool(self._daemons())


def greeter(state: Path) -> int:
    """The process of the daemon that greets at the control socket, or 0 if none does."""
    with socket.socket(socket.AF_UNIX) as connection, suppress(OSError):
        connection.settimeout(WAIT_SECONDS)
        connection.connect(str(state / "firstbyte-control.sock"))
        greeting = connection.makefile().readline()
        return int(json.loads(greeting)["pid"]) if greeting else 0
    return 0


def _target(link: Path) -> bytes:
    try:
        return os.fsencode(os.readlink(link))
    except OSError:  # closed meanwhile
        return b""


def wait_until(condition: Any) -> None:
    """Wait for something that happens soon; the time only bounds a failure."""
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(POLL_SECONDS)


@contextmanager
def instance() -> Iterator[Instance]:
    """A new instance; afterwards nothing of it is left. The path is short: sockets need that."""
    base = Path(tempfile.mkdtemp(prefix="fb-"))
    made = Instance(base)
    try:
        yield made
    finally:
        made.clean()
        shutil.rmtree(base)
