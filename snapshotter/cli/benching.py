"""What all commands of `firstbyte bench` share."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from snapshotter.demo.interruption import InterruptedBySignal, Interruption
from snapshotter.demo.run import check_machine
from snapshotter.demo.workspace import Workspace

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def bench_workspace() -> Iterator[Workspace]:
    """A place for what is started and mounted, all of which goes in the end."""
    check_machine()
    try:
        with Interruption() as interruption, Workspace(interruption, say) as workspace:
            yield workspace
    except InterruptedBySignal as interrupted:
        click.echo(f"firstbyte: {interrupted}", err=True)
        sys.exit(128 + interrupted.number)


def say(what: str) -> None:
    """Tell what is being done."""
    click.echo(f"* {what}", err=True)
