"""Containers that a program runs in the foreground (runc, ctr, podman), and what they print.

The program stays as long as the workload runs, passes on its output, and ends with its exit status.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Sequence
    from pathlib import Path

    from snapshotter.demo.workspace import Workspace

_DRAIN_SECONDS = 0.5  # for the rest of the output of a workload that ended
_KEPT_LINES = 1000  # of the workload's output


class ForegroundContainer:
    """What such containers have in common. The runtime writes the workload's process to
    `pid_file`."""

    def __init__(self, workspace: Workspace, pid_file: Path) -> None:
        self._workspace = workspace
        self._pid_file = pid_file
        self._process: subprocess.Popen[bytes] | None = None
        self.output = Output()

    def _launch(self, command: Sequence[str | Path]) -> None:
        reader, writer = os.pipe()
        try:
            self._process = self._workspace.start(command, output=writer, errors=writer)
        finally:
            os.close(writer)
            self.output.follow(reader)

    def started(self) -> bool:
        """Whether the container was made. What is printed before is the program's complaint."""
        return self.pid() is not None

    def pid(self) -> int | None:
        """The workload's process, once the container was made; its program may start later."""
        with contextlib.suppress(OSError, ValueError):  # not there yet, or not written yet
            return int(self._pid_file.read_text())
        return None

    def exit_status(self) -> int | None:
        """The workload's exit status; None while it runs."""
        return self._process.poll() if self._process else None


class Output:
    """What a workload prints, gathered by a thread as it comes; keeps the last lines."""

    def __init__(self) -> None:
        self._lines: deque[str] = deque(maxlen=_KEPT_LINES)
        self._changed = threading.Condition()
        self._count = 0
        self._reader: threading.Thread | None = None

    def follow(self, descriptor: int) -> None:
        """Read from a pipe until its end, then close it."""
        self._reader = threading.Thread(target=self._read, args=(descriptor,), daemon=True)
        self._reader.start()

    def _read(self, descriptor: int) -> None:
        with open(descriptor, encoding="utf-8", errors="replace") as stream:
            for line in stream:
                with self._changed:
                    self._lines.append(line.rstrip("\n"))
                    self._count += 1
                    self._changed.notify_all()

    def wait(self, count: int, seconds: float) -> tuple[int, list[str]]:
        """Wait for more than `count` lines, at most `seconds`: how many there are now, and the
        new ones."""
        with self._changed:
            self._changed.wait_for(lambda: self._count > count, seconds)
            new = min(self._count - count, len(self._lines))
            return self._count, list(self._lines)[len(self._lines) - new :]

    def last(self, count: int) -> str:
        """The last lines, for an error message; all is read if the workload has ended."""
        if self._reader:
            self._reader.join(_DRAIN_SECONDS)
        with self._changed:
            return "\n".join(list(self._lines)[-count:])
