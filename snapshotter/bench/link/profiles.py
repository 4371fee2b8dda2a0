"""What a link is like: bandwidth, round-trip time, failed requests."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Self

from snapshotter.bench.errors import BenchError

_SPELLING = re.compile(
    r"(?P<mbit>\d+(?:\.\d+)?)mbit-(?P<rtt>\d+(?:\.\d+)?)ms(?:-(?P<failed>\d+(?:\.\d+)?)%)?"
)
_MAX_MBIT = 100_000
_MAX_RTT_MS = 10_000


@dataclass(frozen=True, slots=True)
class LinkProfile:
    """`bandwidth` is bits a second, each way; `rtt` seconds there and back; `failures` the share
    of requests, from 0 to 1, that are answered with 503 and never reach the registry."""

    bandwidth: float
    rtt: float
    failures: float = 0.0

    @classmethod
    def parse(cls, text: str) -> Self:
        """From its name, as 200mbit-20ms or 20mbit-150ms-1%. Raises BenchError."""
        match = _SPELLING.fullmatch(text)
        if not match:
            raise BenchError(
                f"{text!r} is no link",
                hint="write MBITmbit-RTTms, as 200mbit-20ms, or -1% after it",
            )
        mbit, rtt, failed = (float(match[part] or 0) for part in ("mbit", "rtt", "failed"))
        if not 0 < mbit <= _MAX_MBIT or rtt > _MAX_RTT_MS or failed >= 100:
            raise BenchError(
                f"there is no link like {text!r}",
                hint=f"up to {_MAX_MBIT} Mbit/s, {_MAX_RTT_MS} ms, and less than 100 % failed",
            )
        return cls(mbit * 1e6, rtt / 1e3, failed / 100)

    @property
    def name(self) -> str:
        """The shortest spelling that `parse` reads as this profile."""
        failed = f"-{self.failures * 100:g}%" if self.failures else ""
        return f"{self.bandwidth / 1e6:g}mbit-{self.rtt * 1e3:g}ms{failed}"


STANDARD = tuple(
    map(
        LinkProfile.parse,
        (
            "1000mbit-0.5ms",
            "500mbit-5ms",
            "200mbit-20ms",
            "100mbit-50ms",
            "20mbit-150ms-1%",
        ),
    )
)
"""One room, one region, a good line, a far one, a bad one."""
