"""An instance of FirstByte of the benchmark's own, with an empty store."""

from __future__ import annotations

import re
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from snapshotter.bench.errors import BenchError
from snapshotter.daemon import protocol
from snapshotter.demo import lazy

if TYPE_CHECKING:
    from collections.abc import Iterator

    from snapshotter.demo.workspace import Workspace

_END_SECONDS = 30.0
_RSS = re.compile(r"^Rss(?:Anon|File|Shmem):\s*(\d+) kB$", re.MULTILINE)  # proc(5)


class Memory(NamedTuple):
    """What of a process is in memory, in MB: all of it, and what is no mapped file."""

    resident: float
    private: float


class Node(lazy.Node):
    """A daemon that runs, and then another one in its place. What it is asked, this process asks
    itself: a command would take its time, too."""

    def replace(self) -> None:
        """Have a new daemon take over, as in an upgrade; returns when it has, and the old one has
        ended. Raises BenchError or DemoError.
        """
        predecessor, self._daemon = self._daemon, self._start("--replace")
        try:
            predecessor.wait(_END_SECONDS)
        finally:
            predecessor.kill()
        self._wait()

    def restart(self) -> None:
        """Kill the daemon (SIGKILL), and start one at once, as a service manager does."""
        self._daemon.kill()
        self._daemon.wait()
        self._daemon = self._start()
        self._wait()

    def show(
        self,
        reference: str,
        target: Path,
        *,
        wait_local: bool,
        mode: str = "",
        index: Path | None = None,
    ) -> None:
        """Mount an image on a directory; with `wait_local` return when all of it is here.

        `mode` and `index` as `firstbyte mount` has them.
        """
        request = protocol.MountRequest(
            reference=reference,
            target=str(target),
            wait_local=wait_local,
            mode=mode,
            index=str(index or ""),
        )
        self._ask(request, protocol.Mounted)

    def hide(self, target: Path) -> None:
        """Take a mount down."""
        self._ask(protocol.UmountRequest(str(target)), protocol.Unmounted)

    def memory(self) -> Memory:
        """What the daemon has in memory now. Raises BenchError if it has ended."""
        try:
            status = Path(f"/proc/{self.pid}/status").read_text()
        except OSError as error:
            raise BenchError("a daemon that was measured has ended") from error
        private, mapped, shared = (int(found) * 1024 / 1e6 for found in _RSS.findall(status))
        return Memory(private + mapped + shared, private)


@contextmanager
def running_node(workspace: Workspace, name: str) -> Iterator[Node]:
    """Run a daemon of a new `name`; at the end it and its mounts are gone. Raises DemoError."""
    node = Node(workspace, name)
    try:
        yield node
    finally:
        node.stop()
