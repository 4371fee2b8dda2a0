"""What every command that talks to registries takes: options, and the way in."""

from __future__ import annotations

from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from snapshotter.daemon import config
from snapshotter.registry.platform import Platform

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from snapshotter.registry.locations import Locations

_CONFIG = "snapshotter.config"  # key of the configuration in click's context

_F = TypeVar("_F", bound="Callable[..., Any]")

platform_option = click.option(
    "--platform",
    metavar="OS/ARCH[/VARIANT]",
    help="Which image of a multi-platform name to take [default: this machine's].",
)
plain_http_option = click.option(
    "--plain-http",
    is_flag=True,
    help="Speak HTTP without TLS (loopback registries do without being told).",
)
config_option = click.option(
    "--config",
    type=click.Path(path_type=Path, dir_okay=False),
    expose_value=False,
    callback=lambda context, _, path: context.meta.__setitem__(_CONFIG, config.load(path)),
    help=f"The configuration file [default: {config.DEFAULT_CONFIG}, if it exists].",
)
index_option = click.option(
    "--index",
    "index_file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Use this file index [default: the image's own, else one is built here].",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON for scripts.")


def registry_options(command: _F) -> _F:
    """`--platform`, `--plain-http` and `--config`."""
    return platform_option(plain_http_option(config_option(command)))


def configuration() -> config.Config:
    """What --config named, or the usual file."""
    found = click.get_current_context().meta[_CONFIG]
    assert isinstance(found, config.Config)
    return found


def chosen_platform(text: str | None) -> Platform:
    """The platform that was asked for, or this machine's. Raises InvalidReferenceError."""
    return Platform.parse(text) if text else Platform.host()


@asynccontextmanager
async def connect(*, plain_http: bool) -> AsyncIterator[Locations]:
    """Registries and layouts, for as long as the block runs."""
    # HTTP takes 0.1 s to import; `firstbyte status` and the like leave it to the daemon
    from snapshotter.registry.credentials import CredentialStore
    from snapshotter.registry.hosts_tree import HostsTree
    from snapshotter.registry.locations import Locations
    from snapshotter.registry.registries_conf import RegistriesConf
    from snapshotter.registry.transport import Transport

    registry = configuration().registry
    hosts = HostsTree(registry.config_path, RegistriesConf(registry.registries_conf))
    async with Transport() as transport:
        yield Locations(transport, CredentialStore(), hosts=hosts, plain_http=plain_http or None)
