"""Progress of long work: bars on a terminal, plain lines elsewhere, both on standard error."""

from __future__ import annotations

import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

import click

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.progress import TaskID

QUIET_SECONDS = 1.0  # what ends sooner needs no progress
LINE_SECONDS = 5.0  # between plain lines


class Task(Protocol):
    """One thing that takes long. Amounts are bytes."""

    def update(self, done: int, total: int | None = None) -> None:
        """Set how much is done, and the total once it is known."""


class Progress(Protocol):
    """Where tasks show how far they are."""

    def task(self, description: str, total: int | None) -> Task:
        """Add a line or a bar for a piece of work of `total` bytes (None: not known)."""


@contextmanager
def show(*, quiet: bool = False) -> Iterator[Progress]:
    """Show progress until the block ends. `quiet` (for `--json`) shows nothing."""
    if quiet:
        yield _Silent()
    elif sys.stderr.isatty():
        with _bars() as bars:
            yield bars
    else:
        yield _Lines()


class _Silent:
    def task(self, description: str, total: int | None) -> Task:
        return self

    def update(self, done: int, total: int | None = None) -> None:
        pass


class _Lines:
    """A line when a task is slow, then one every few seconds, and one at its end."""

    def task(self, description: str, total: int | None) -> Task:
        return _LineTask(description, total)


class _LineTask:
    def __init__(self, description: str, total: int | None) -> None:
        self._description = description
        self._total = total
        self._started = time.monotonic()
        self._next_line = self._started + QUIET_SECONDS
        self._spoken = False

    def update(self, done: int, total: int | None = None) -> None:
        self._total = total if total is not None else self._total
        now = time.monotonic()
        finished = self._spoken and done == self._total
        if now < self._next_line and not finished:
            return
        self._next_line = now + LINE_SECONDS
        self._spoken = not finished
        rate = done / max(now - self._started, 1e-3)
        line = f"{self._description}: {mb(done)}"
        if self._total:
            line += f" of {mb(self._total)} ({100 * done // self._total} %)"
        line += f", {mb(rate)}/s"
        if self._total and rate and not finished:
            line += f", {(self._total - done) / rate:.0f} s left"
        click.echo(line, err=True)


def mb(amount: float) -> str:
    """An amount of bytes for people, in decimal megabytes as registries count them."""
    return f"{amount / 1e6:.1f} MB"


class _Bars:
    def __init__(self) -> None:
        from rich import progress
        from rich.console import Console

        self.rich = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.DownloadColumn(),
            progress.TransferSpeedColumn(),
            progress.TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
        )

    def task(self, description: str, total: int | None) -> Task:
        return _BarTask(self.rich, self.rich.add_task(description, total=total))


class _BarTask:
    def __init__(self, bars: object, number: TaskID) -> None:
        from rich.progress import Progress as RichProgress

        assert isinstance(bars, RichProgress)
        self._bars, self._number = bars, number

    def update(self, done: int, total: int | None = None) -> None:
        self._bars.update(self._number, completed=done, total=total)


@contextmanager
def _bars() -> Iterator[Progress]:
    bars = _Bars()
    with bars.rich:
        yield bars
