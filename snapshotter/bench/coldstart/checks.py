"""Whether a workload answers as it should."""

from __future__ import annotations

import http.client
import json
import re
import time
from typing import TYPE_CHECKING

from snapshotter.bench.errors import BenchError
from snapshotter.demo.interruption import POLL_SECONDS

if TYPE_CHECKING:
    from collections.abc import Callable

    from snapshotter.bench.coldstart.catalogue import Check
    from snapshotter.bench.link.namespaces import Connector
    from snapshotter.demo.foreground import Output

_ANSWER_SECONDS = 10.0
_PAUSE_SECONDS = 0.005  # between attempts while nobody listens
_PIECE = 64 << 10
_STALLS = "stalls "  # before a JSON list of microseconds, on a line of a reader's output


class Asker:
    """Makes one check of a workload whose network `connector` reaches; lines are of `output`."""

    def __init__(self, check: Check, connector: Connector, output: Output) -> None:
        self._check = check
        self._connector = connector
        self._output = output
        self._seen = 0
        self._answers: Callable[[], bool] = (
            self._http if check.http else self._tcp if check.tcp else self._line
        )

    def answered(self) -> bool:
        """Whether it answers as it should. If not, some time has passed, at most POLL_SECONDS more
        than an answer takes."""
        try:
            if self._answers():
                return True
        except (OSError, http.client.HTTPException):
            pass  # nobody listens yet, or not as it should be: both may change
        if not self._check.line:
            time.sleep(_PAUSE_SECONDS)
        return False

    def work(self) -> None:
        """Have it answer as often as the check says. Raises BenchError if it does not."""
        for _ in range(self._check.times):
            try:
                if self._answers():
                    continue
            except (OSError, http.client.HTTPException) as error:
                raise BenchError(f"a workload that was ready fails: {error}") from error
            raise BenchError("a workload that was ready answers otherwise than it should")

    def _http(self) -> bool:
        port, path = self._check.http_target
        connection = http.client.HTTPConnection("127.0.0.1", port)
        connection.sock = self._connector.connect(port, _ANSWER_SECONDS)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status == http.HTTPStatus.OK and bool(answer.read())
        finally:
            connection.close()

    def _tcp(self) -> bool:
        pattern = re.compile(self._check.expect.encode())
        with self._connector.connect(self._check.tcp, _ANSWER_SECONDS) as connection:
            connection.sendall(self._check.send.encode())
            answer = bytearray()
            while piece := connection.recv(_PIECE):
                answer += piece
                if pattern.search(answer):
                    return True
        return False

    def _line(self) -> bool:
        self._seen, lines = self._output.wait(self._seen, POLL_SECONDS)
        return any(re.search(self._check.line, line) for line in lines)


def stalls(output: Output) -> list[float]:
    """The seconds of single reads, of a workload that tells them; empty for others."""
    _, lines = output.wait(0, 0.0)
    for line in lines:
        if line.startswith(_STALLS):
            return [microseconds / 1e6 for microseconds in json.loads(line.removeprefix(_STALLS))]
    return []
