"""What every command that talks to registries takes: options, and the way in."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import click

from snapshotter.registry.platform import Platform

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from snapshotter.registry.locations import Locations

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
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON for scripts.")


def registry_options(command: _F) -> _F:
    """`--platform` and `--plain-http`."""
    return platform_option(plain_http_option(command))


def chosen_platform(text: str | None) -> Platform:
    """The platform that was asked for, or this machine's. Raises InvalidReferenceError."""
    return Platform.parse(text) if text else Platform.host()


@asynccontextmanager
async def connect(*, plain_http: bool) -> AsyncIterator[Locations]:
    """Registries and layouts, for as long as the block runs."""
    # HTTP takes 0.1 s to import; `firstbyte status` and the like leave it to the daemon
    from snapshotter.registry.credentials import CredentialStore
    from snapshotter.registry.locations import Locations
    from snapshotter.registry.transport import Transport

    async with Transport() as transport:
        yield Locations(transport, CredentialStore(), plain_http=plain_http or None)
