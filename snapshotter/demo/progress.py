"""What the demo says while it works: a line for each step, and a sign of life every two seconds."""

from __future__ import annotations

import contextlib
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from collections.abc import Iterator

ALIVE_SECONDS = 2.0


class Narrator:
    """Writes lines to a stream; a reader that went away does not stop the work."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def say(self, line: str) -> None:
        """Write one line now."""
        with contextlib.suppress(OSError):
            self._stream.write(line + "\n")
            self._stream.flush()

    @contextmanager
    def step(self, what: str) -> Iterator[Step]:
        """Announce a step, show signs of life during the block, and then how long it took."""
        self.say(f"* {what}")
        step = Step()
        ended = threading.Event()
        alive = threading.Thread(target=self._show_life, args=(step, ended), daemon=True)
        alive.start()
        try:
            yield step
        finally:
            ended.set()
            alive.join()
        self.say(f"  {step.describe()}")

    def _show_life(self, step: Step, ended: threading.Event) -> None:
        while not ended.wait(ALIVE_SECONDS):
            self.say(f"  … {step.describe()}")


class Step:
    """One piece of work. `detail` may be set from any thread while it goes on."""

    def __init__(self) -> None:
        self.detail = ""
        self._started = time.monotonic()

    def describe(self) -> str:
        """Seconds so far, and the detail."""
        seconds = f"{time.monotonic() - self._started:.1f} s"
        return f"{seconds}, {self.detail}" if self.detail else seconds
