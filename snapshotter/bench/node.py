"""An instance of FirstByte of the benchmark's own, with an empty store."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import trio

from snapshotter.bench.errors import BenchError
from snapshotter.daemon import client, protocol
from snapshotter.daemon.places import Places

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from snapshotter.daemon.protocol import MountStatus, Reply, Request

_READY_SECONDS = 30.0
_END_SECONDS = 30.0
_POLL_SECONDS = 0.02


class Node:
    """Talks to a daemon that runs."""

    def __init__(self, places: Places) -> None:
        self._places = places

    def mount(self, reference: str, target: Path, *, wait_local: bool) -> MountStatus:
        """Mount an image on a directory; with `wait_local` return when all of it is here."""
        request = protocol.MountRequest(
            reference=reference, target=str(target), wait_local=wait_local
        )
        reply = self._ask(request)
        assert isinstance(reply, protocol.Mounted)
        return reply.mount

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
        node = Node(places)
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
