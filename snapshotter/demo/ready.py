"""When a workload counts as ready."""

from __future__ import annotations

import http.client
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from snapshotter.demo.errors import DemoError
from snapshotter.demo.interruption import POLL_SECONDS

if TYPE_CHECKING:
    import re

    from snapshotter.demo.foreground import Output
    from snapshotter.demo.interruption import Interruption

_START_POLL_SECONDS = 0.005
_HTTP_POLL_SECONDS = 0.02
_HTTP_SECONDS = 5.0  # for one answer
_SHOWN_LINES = 15


class Watched(Protocol):
    """A container, as far as it is looked at here."""

    output: Output

    def started(self) -> bool:
        """Whether its workload was started. What is printed before are the runtime's words."""

    def exit_status(self) -> int | None:
        """The workload's exit status; None while it runs."""


class Probe(Protocol):
    """Watches one container from its start on."""

    def ready(self, container: Watched) -> bool:
        """Whether the workload is ready; may wait POLL_SECONDS for something to happen."""

    @property
    def description(self) -> str:
        """What is waited for, to follow "ready when"."""


@dataclass
class HttpProbe:
    """Ready when `http://127.0.0.1:PORT/PATH` is answered with status 200 and a body."""

    port: int
    path: str

    def ready(self, container: Watched) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=_HTTP_SECONDS)
        try:
            connection.request("GET", self.path)
            answer = connection.getresponse()
            if answer.status == http.HTTPStatus.OK and answer.read():
                return True
        except (OSError, http.client.HTTPException):
            pass  # nobody listens yet, or not as it should be: both may change
        finally:
            connection.close()
        time.sleep(_HTTP_POLL_SECONDS)
        return False

    @property
    def description(self) -> str:
        return f"http://127.0.0.1:{self.port}{self.path} answers"


class LineProbe:
    """Ready when a line of the workload's output matches a pattern."""

    def __init__(self, pattern: re.Pattern[str]) -> None:
        self._pattern = pattern
        self._seen = 0

    def ready(self, container: Watched) -> bool:
        self._seen, lines = container.output.wait(self._seen, POLL_SECONDS)
        return any(map(self._pattern.search, lines))

    @property
    def description(self) -> str:
        return f"a line matches {self._pattern.pattern!r}"


class SignOfLifeProbe:
    """Ready when the workload has printed a line, or has ended with success."""

    def ready(self, container: Watched) -> bool:
        seen, _ = container.output.wait(0, POLL_SECONDS)
        return seen > 0 or container.exit_status() == 0

    @property
    def description(self) -> str:
        return "it prints a line, or ends with success"


def wait_ready(
    probe: Probe, container: Watched, interruption: Interruption, seconds: float
) -> None:
    """Return when `probe` says so. Raises DemoError if the workload ends before, or after
    `seconds`; the last lines of its output come along."""
    end = time.monotonic() + seconds
    while True:
        interruption.check()
        status = container.exit_status()
        if container.started():
            if probe.ready(container):
                return
        else:
            time.sleep(_START_POLL_SECONDS)
        if status is not None:
            problem = f"the workload ended with status {status} before it was ready"
        elif time.monotonic() > end:
            problem = f"the workload was not ready within {seconds:.0f} s"
        else:
            continue
        raise DemoError(
            f"{problem} (ready when {probe.description})",
            hint=container.output.last(_SHOWN_LINES) or "it printed nothing",
        )
