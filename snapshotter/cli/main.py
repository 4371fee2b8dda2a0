"""The one command, `firstbyte`."""

from __future__ import annotations

import atexit
import gc
import importlib
import os
import sys

import click

from index.errors import FirstByteError

# Before it ends, Python looks for cycles in all that was imported: 0.1 s in the daemon, whose end a
# successor or `firstbyte umount` waits for, and a sixth of what `firstbyte status` takes.
atexit.register(gc.freeze)

# Command to module. Each is imported when it is asked for: `firstbyte umount` need not wait for
# what only `firstbyte convert` uses.
COMMANDS = {
    "bench": "snapshotter.cli.bench",
    "config": "snapshotter.cli.config",
    "convert": "snapshotter.cli.convert",
    "daemon": "snapshotter.cli.mount",
    "demo": "snapshotter.cli.demo",
    "df": "snapshotter.cli.store",
    "doctor": "snapshotter.cli.doctor",
    "gc": "snapshotter.cli.store",
    "index": "snapshotter.cli.index",
    "mount": "snapshotter.cli.mount",
    "podman": "snapshotter.cli.podman",
    "profile": "snapshotter.cli.profile",
    "status": "snapshotter.cli.mount",
    "umount": "snapshotter.cli.mount",
    "why": "snapshotter.cli.why",
}


class Commands(click.Group):
    """Finds subcommands by name and turns errors into one line and an exit status."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        command = getattr(importlib.import_module(COMMANDS[name]), name)
        assert isinstance(command, click.Command)
        return command

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except (Exception, KeyboardInterrupt, BaseExceptionGroup) as error:
            cause = first(error)
            if isinstance(cause, (click.ClickException, click.exceptions.Exit, BrokenPipeError)):
                raise cause from None
            if ctx.params.get("debug"):
                raise
            click.echo(f"firstbyte: {describe(cause)}", err=True)
        sys.exit(130 if isinstance(cause, KeyboardInterrupt) else 1)


def first(error: BaseException) -> BaseException:
    """The first plain exception in nested groups: the cause, the others being its echoes."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def describe(error: BaseException) -> str:
    """One line for a person."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, FirstByteError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return f"{os.fsdecode(error.filename)}: {error.strerror}" if error.filename else str(error)
    return f"internal error: {error!r}; run it again with --debug and report what it prints"


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="firstbyte")
@click.option("--debug", is_flag=True, help="Show a traceback when something fails.")
def main(debug: bool) -> None:
    """Start containers when their first byte arrives, not their last.

    For completion: eval "$(_FIRSTBYTE_COMPLETE=bash_source firstbyte)", or zsh_source, or
    fish_source.
    """


def podman_credentials() -> None:
    """`firstbyte podman credentials` as a program, which podman runs without arguments."""
    main(["podman", "credentials", *sys.argv[1:]], prog_name="firstbyte")


if __name__ == "__main__":
    main()
