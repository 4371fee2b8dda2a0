"""`firstbyte config`: is the configuration right, and what is in force."""

from __future__ import annotations

from pathlib import Path

import click
import msgspec

from snapshotter.cli.connection import config_option, configuration, json_option
from snapshotter.daemon.config import Config, encode, load, usual_file
from snapshotter.daemon.config_check import in_toml, keys


@click.group()
def config() -> None:
    """Check the configuration file, and show what is in force."""


@config.command()
@click.argument(
    "file",
    required=False,
    type=click.Path(path_type=Path, dir_okay=False),
)
def check(file: Path | None) -> None:
    """Say whether FILE is a configuration, else what is wrong with it and where.

    Without FILE it is the usual one, which need not exist.
    """
    load(file)
    name = file or usual_file()
    click.echo(f"{name} is right" if name.exists() else f"there is no {name}: defaults are used")


@config.command()
@config_option
@json_option
def show(as_json: bool) -> None:
    """Print the configuration in force, every key with its value."""
    shown = configuration()
    shown = msgspec.structs.replace(shown, address=shown.socket)
    click.echo(encode(shown) if as_json else _toml(shown), nl=as_json)


def _toml(shown: Config) -> str:
    lines = []
    table: tuple[str, ...] = ()
    for key in keys(Config):
        *tables, name = key.place
        if table != (table := tuple(tables)):
            lines += ["", f"[{'.'.join(table)}]"]
        value: object = shown
        for field in key.place:
            value = getattr(value, field)
        lines.append(f"{name} = {in_toml(value)}")
    return "\n".join(lines) + "\n"
