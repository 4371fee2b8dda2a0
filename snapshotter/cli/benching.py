"""What all commands of `firstbyte bench` share."""

from __future__ import annotations

import sys
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, TypeVar

import click

from snapshotter.bench import tables
from snapshotter.cli.connection import json_option
from snapshotter.demo.interruption import InterruptedBySignal, Interruption
from snapshotter.demo.run import check_machine
from snapshotter.demo.workspace import Workspace

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from snapshotter.bench.tables import Table

_F = TypeVar("_F", bound="Callable[..., Any]")


@contextmanager
def bench_workspace(*, computing: bool = False) -> Iterator[Workspace]:
    """A place for what is started and mounted, all of which goes in the end.

    What is done there looks for signals by itself, unless it is `computing`: that is ended wherever
    it is.
    """
    check_machine()
    try:
        with Interruption() as interruption, Workspace(interruption, say) as workspace:
            try:
                with interruption.at_once() if computing else nullcontext():
                    yield workspace
            except Exception:
                interruption.check()  # the same Ctrl-C may have ended what has failed
                raise
    except InterruptedBySignal as interrupted:
        click.echo(f"firstbyte: {interrupted}", err=True)
        sys.exit(128 + interrupted.number)


def output_options(samples: int) -> Callable[[_F], _F]:
    """What every benchmark that prints tables takes; `samples` is how many it makes by default."""

    def add(command: _F) -> _F:
        for option in (
            click.option("--markdown", "as_markdown", is_flag=True, help="Print Markdown tables."),
            json_option,
            samples_option(samples),
        ):
            command = option(command)
        return command

    return add


def samples_option(default: int) -> Callable[[_F], _F]:
    """How often something is measured."""
    return click.option(
        "--samples",
        type=click.IntRange(min=1),
        default=default,
        show_default=True,
        help="How often everything is measured.",
    )


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
