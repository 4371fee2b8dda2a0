"""How long the network is waited for."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Deadlines:
    """How long to wait, in seconds, before an exchange counts as failed.

    `connect`: for a free connection, and to connect with TLS. `answer`: for the status line, or
    for room to send. `stall`: for body bytes in sum, beyond what `min_rate` (bytes/s) allows for
    those that came: a server that drips a byte now and then does not hold us. Time the reader
    takes to use the bytes does not count. All guesses on the patient side.
    """

    connect: float = 15
    answer: float = 60
    stall: float = 30
    min_rate: float = 4096

    def hurried(self) -> Deadlines:
        """For a server that others can stand in for. Guesses: two such that hang leave time for a
        third before the fetch scheduler gives a request up, after 30 s."""
        return replace(
            self,
            connect=min(self.connect, 5),
            answer=min(self.answer, 10),
            stall=min(self.stall, 10),
        )
