"""An instance of FirstByte of the benchmark's own, with an empty store."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import trio

from snapshotter.bench.errors import BenchError
from snapshotter.daemon import client, protocol
from snapshotter.daemon.errors import DaemonError
from snapshotter.daemon.places import Places

if TYPE_CHECKING:
    from collections.abc import Iterator

    from snapshotter.daemon.protocol import MountStatus, Reply, Request

_READY_SECONDS = 30.0
_END_SECONDS = 30.0
_POLL_SECONDS = 0.02
_RSS = re.compile(r"^Rss(?:Anon|File|Shmem):\s*(\d+) kB$", re.MULTILINE)  # proc(5)


class Memory(NamedTuple):
    """What of a process is in memory, in MB: all of it, and what is no mapped file."""

    resident: float
    private: float


class Node:
    """A daemon that runs, and then another one in its place. Started by `running_node`."""

    def __init__(self, places: Places) -> None:
        self._places = places
        self.process = _spawn(places)
        self._wait_ready()

    def replace(self) -> None:
        """Have a new daemon take over, as in an upgrade; returns when it has, and the old one has
        ended. Raises BenchError.
        """
        predecessor, self.process = self.process, _spawn(self._places, "--replace")
        try:
            predecessor.wait(_END_SECONDS)
        finally:
            predecessor.kill()
        self._wait_ready()

    def restart(self) -> None:
        """Kill the daemon (SIGKILL), and start one at once, as a service manager does."""
        self.process.kill()
        self.process.wait()
        self.process = _spawn(self._places)
        self._wait_ready()

    def _wait_ready(self) -> None:
        end = time.monotonic() + _READY_SECONDS
        while self._answering() != self.process.pid:
            if self.process.poll() is not None or time.monotonic() > end:
                raise BenchError(
                    "the daemon does not start", hint=self._places.log.read_text()[-500:]
                )
            time.sleep(_POLL_SECONDS)

    def _answering(self) -> int:
        """The process that answers, or 0."""
        try:
            status = self._ask(protocol.StatusRequest())
        except DaemonError:  # the old one, which is just ending
            return 0
        return status.pid if isinstance(status, protocol.Status) else 0

    def mount(
        self,
        reference: str,
        target: Path,
        *,
        wait_local: bool,
        mode: str = "",
        index: Path | None = None,
    ) -> MountStatus:
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
        reply = self._ask(request)
        assert isinstance(reply, protocol.Mounted)
        return reply.mount

    def umount(self, target: Path) -> None:
        """Take a mount down."""
        self._ask(protocol.UmountRequest(str(target)))

    def memory(self) -> Memory:
        """What the daemon has in memory now."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        private, mapped, shared = (int(found) * 1024 / 1e6 for found in _RSS.findall(status))
        return Memory(private + mapped + shared, private)

    def _ask(self, request: Request) -> Reply | None:
        return trio.run(partial(client.ask, self._places, request, start=None))


@contextmanager
def running_node(base: Path) -> Iterator[Node]:
    """Run a daemon with its data and state below `base`; at the end it and its mounts are gone.

    Raises BenchError if it does not start.
    """
    places = Places(base / "root", base / "state")
    places.create()
    node = None
    try:
        node = Node(places)
        yield node
    finally:
        if node is not None:
            node.process.send_signal(signal.SIGINT)  # which takes everything down
            try:
                node.process.wait(_END_SECONDS)
            finally:
                node.process.kill()


def _spawn(places: Places, *options: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "snapshotter.cli.main", "daemon", *options]
    command += ["--root", str(places.root), "--state", str(places.state)]
    with places.log.open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log)
