"""One directory with everything the demo starts or mounts, and the way back from it.

Whoever makes something that has to go away again says so with `defer` before making it; `close`
undoes all in reverse order, each step with a deadline of its own and none stopping the next. What
slipped through is found by marks that cannot be mistaken: processes by a variable in their
environment, mounts by their place below the directory.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Self

from index.errors import FirstByteError
from snapshotter.demo.errors import DemoError
from snapshotter.demo.interruption import POLL_SECONDS, Interruption
from snapshotter.mounts.errors import MountError
from snapshotter.mounts.syscalls import unmount
from snapshotter.mounts.table import read_mounts

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from types import TracebackType

# In the environment of every process that is started here, and so of their children.
MARK = "FIRSTBYTE_DEMO"

# Unless TMPDIR says otherwise. It is on a disk, /tmp may be a tmpfs; names in it are random.
_PARENT = "/var/tmp"  # noqa: S108

_GRACE_SECONDS = 5.0  # from SIGTERM to SIGKILL
_LAST_LINES = 12  # of a failed program's output, for the error message


class Workspace:
    """A temporary directory, the processes started for it and the mounts below it."""

    def __init__(self, interruption: Interruption, warn: Callable[[str], None]) -> None:
        self.interruption = interruption
        self._warn = warn
        self._steps: list[tuple[str, Callable[[], None]]] = []
        self.path = self._temporary = Path()

    def __enter__(self) -> Self:
        parent = os.environ.get("TMPDIR", _PARENT)
        self.path = Path(tempfile.mkdtemp(prefix="firstbyte-demo-", dir=parent)).resolve()
        self._temporary = self.directory("tmp")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def directory(self, *parts: str) -> Path:
        """A directory below the workspace, made if it is not there."""
        path = self.path.joinpath(*parts)
        path.mkdir(parents=True, exist_ok=True)
        return path

    def defer(self, what: str, step: Callable[[], None]) -> None:
        """Have `step` called at the end, before all that were deferred earlier.

        It must bear being called when its work is done already, or was never begun.
        """
        self._steps.append((what, step))

    def run(
        self,
        argv: Sequence[str | Path],
        *,
        seconds: float,
        environment: Mapping[str, str] | None = None,
    ) -> str:
        """Run a program to its end and return its standard output; `environment` is added to ours.

        Raises DemoError with the end of its output if it fails or takes longer than `seconds`.
        """
        name = " ".join(str(part) for part in argv[:3])
        with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
            process = self.start(
                argv,
                output=output.fileno(),
                errors=errors.fileno(),
                environment=environment,
            )
            try:
                ended = self._wait(process, seconds)
            finally:
                stop_group(process)
            output.seek(0)
            errors.seek(0)
            text = output.read().decode(errors="replace")
            if ended and process.returncode == 0:
                return text
            failure = f"failed with status {process.returncode}" if ended else "took too long"
            lines = (errors.read().decode(errors="replace") or text).strip().splitlines()
        raise DemoError(f"{name} {failure}", hint="\n".join(lines[-_LAST_LINES:]))

    def _wait(self, process: subprocess.Popen[bytes], seconds: float) -> bool:
        descriptor = os.pidfd_open(process.pid)
        try:
            if not self.interruption.wait(descriptor, seconds):
                return False
        finally:
            os.close(descriptor)
        process.wait()
        return True

    def start(
        self,
        argv: Sequence[str | Path],
        *,
        output: int,
        errors: int,
        source: int = subprocess.DEVNULL,
        environment: Mapping[str, str] | None = None,
    ) -> subprocess.Popen[bytes]:
        """Start a program in a session of its own, so that Ctrl-C reaches only the demo.

        `source`, `output` and `errors` are its standard streams, as Popen takes them.

        What it makes or mounts in its directory for temporary files is below the workspace, too.
        """
        try:
            return subprocess.Popen(
                argv,
                stdin=source,
                stdout=output,
                stderr=errors,
                start_new_session=True,
                cwd=self.path,
                env={
                    **os.environ,
                    **(environment or {}),
                    MARK: str(self.path),
                    "TMPDIR": str(self._temporary),
                },
            )
        except FileNotFoundError:
            raise DemoError(
                f"{argv[0]} is not installed",
                hint="'make demo' installs what is needed, and 'make bench' for benchmarks",
            ) from None

    def close(self) -> None:
        """Undo everything, whatever happens on the way; signals no longer count."""
        self.interruption.disarm()
        for what, step in reversed(self._steps):
            try:
                step()
            except (FirstByteError, OSError, subprocess.SubprocessError) as error:
                self._warn(f"{what}: {error}")
        self._steps.clear()
        self._end_processes()
        self._unmount_all()
        if left := mounts_below(self.path):
            self._warn(f"still mounted: {left[0]}")  # removing files could reach into it
        else:
            shutil.rmtree(self.path, onerror=lambda _call, path, _error: self._complain(path))

    def _complain(self, path: str) -> None:
        self._warn(f"could not remove {path}")

    def _end_processes(self) -> None:
        for number in (signal.SIGTERM, signal.SIGKILL):
            end = time.monotonic() + _GRACE_SECONDS
            while (pids := marked_processes(self.path)) and time.monotonic() < end:
                for pid in pids:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, number)
                time.sleep(POLL_SECONDS)

    def _unmount_all(self) -> None:
        for point in mounts_below(self.path):
            with contextlib.suppress(MountError):
                unmount(point, detach=True)


def stop_group(process: subprocess.Popen[bytes], *signals: signal.Signals) -> None:
    """End a process started by Workspace.start, with its group; nothing if it ended already.

    The signals are sent one after the other, with time to end after each.
    """
    for number in signals or (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is not None:
            return
        os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE_SECONDS)


def mounts_below(directory: Path) -> list[Path]:
    """The mount points below a directory, those mounted last first."""
    prefix = os.fsencode(directory) + b"/"
    points = (entry.point for entry in read_mounts())
    return [Path(os.fsdecode(point)) for point in points if point.startswith(prefix)][::-1]


def marked_processes(directory: Path) -> list[int]:
    """The processes that carry the mark of the workspace at `directory`, without this one."""
    mark = f"{MARK}={directory}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal() or int(entry.name) == os.getpid():
            continue
        # Gone meanwhile, or not ours to look at: then it is none of ours.
        with contextlib.suppress(OSError):
            if mark in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
    return found
