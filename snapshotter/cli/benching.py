"""What all commands of `firstbyte bench` share."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from snapshotter.bench import tables
from snapshotter.demo.interruption import InterruptedBySignal, Interruption
from snapshotter.demo.run import check_machine
from snapshotter.demo.workspace import Workspace

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from snapshotter.bench.tables import Table


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


def show(results: Sequence[Table], as_json: bool, as_markdown: bool) -> None:
    """Print tables in the way that was asked for."""
    if as_json:
        click.echo(tables.as_json(results))
    elif as_markdown:
        click.echo(tables.as_markdown(results))
    else:
        click.echo(tables.as_text(results))
