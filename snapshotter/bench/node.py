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
    """Talks to a daemon that runs."""

    def __init__(self, places: Places, pid: int) -> None:
        self._places = places
        self._pid = pid

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
        status = Path(f"/proc/{self._pid}/status").read_text()
        private, mapped, shared = (int(found) * 1024 / 1e6 for found in _RSS.findall(status))
        return Memory(private + mapped + shared, private)

    def answers(self) -> bool:
        """Whether the daemon is up."""
        return self._ask(protocol.StatusRequest()) is not None

    def _ask(self, request: Request) -> Reply | None:
        return trio.run(partial(client.ask, self._places, request, start=None))


@contextmanager
def running_node(base: Path) -> Iterator[Node]:
    """Run a daemon with its data and state below `base`; at the end it and its mounts are gone.

    Raises BenchError if it does not start.
    """
    places = Places(base / "root", base / "state")
    places.create()
    command = [sys.executable, "-m", "snapshotter.cli.main", "daemon"]
    command += ["--root", str(places.root), "--state", str(places.state)]
    with places.log.open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        node = Node(places, process.pid)
        end = time.monotonic() + _READY_SECONDS
        while not node.answers():
            if process.poll() is not None or time.monotonic() > end:
                raise BenchError("the daemon does not start", hint=places.log.read_text()[-500:])
            time.sleep(_POLL_SECONDS)
        yield node
    finally:
        process.send_signal(signal.SIGINT)  # which takes everything down
        try:
            process.wait(_END_SECONDS)
        finally:
            process.kill()
