"""`firstbyte podman`: images that podman and CRI-O start before they have been downloaded."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

import click
import msgspec

from snapshotter.cli.connection import index_option, json_option, platform_option
from snapshotter.cli.mount import (
    absolute,
    absolute_layout,
    act_as_root,
    ask_with_progress,
    chosen_config,
    places_of,
    places_options,
    progress_of,
)
from snapshotter.daemon import client, protocol
from snapshotter.daemon.errors import DaemonError
from snapshotter.podman import rootless
from snapshotter.podman.graph_root import GraphRoot
from snapshotter.podman.storage_conf import (
    find_storage_conf,
    read_storage_conf,
    usual_graph_root,
)

if TYPE_CHECKING:
    from pathlib import Path

    from snapshotter.daemon.places import Places

_MOST_CREDENTIALS = 1 << 20  # bytes; of one image it is some 100, and tokens have a few thousand
_HELPER_SECONDS = 5.0  # podman waits for us without end, and pulls without us as well


@click.group()
def podman() -> None:
    """Images for podman and CRI-O, in an additional image store.

    storage.conf has to name the store: see docs/podman.md, or firstbyte doctor podman.
    """


@podman.command()
@click.argument("reference")
@click.option(
    "--layers",
    is_flag=True,
    help="Keep its layers: podman can push and save it then, and what is built on it.",
)
@index_option
@places_options
@platform_option
@json_option
def add(
    reference: str,
    layers: bool,
    index_file: Path | None,
    root: Path | None,
    state: Path | None,
    platform: str | None,
    as_json: bool,
) -> None:
    """Let podman run an image at once; it is downloaded while the container runs.

    The image stays until firstbyte podman rm, across restarts. A tag that has moved since is
    followed when the command is repeated. A daemon is started if none runs.
    """
    places = places_of(root, state)
    act_as_root(places)
    _require_shared_namespace(places)
    request = protocol.PodmanAddRequest(
        reference=absolute_layout(reference),
        platform=platform or "",
        index=absolute(index_file) if index_file else "",
        graph_roots=_graph_roots(),
        layers=layers,
    )
    reply = ask_with_progress(request, root, state, quiet=as_json)
    assert isinstance(reply, protocol.PodmanAdded)
    if as_json:
        click.echo(json.dumps(msgspec.to_builtins(reply.image)))
    else:
        click.echo(f"podman can run {reply.image.names[-1]} ({reply.image.id[:12]})")


@podman.command()
@click.argument("images", metavar="IMAGE...", nargs=-1, required=True)
@places_options
def rm(images: tuple[str, ...], root: Path | None, state: Path | None) -> None:
    """Take images out of the store, by name or ID.

    Fails for one that a container uses, a stopped one too, or that an image was built on.
    """
    places = places_of(root, state)
    act_as_root(places)
    for image in images:
        request = protocol.PodmanRemoveRequest(absolute_layout(image), _graph_roots())
        reply = client.ask(places, request, start=chosen_config(root, state))
        assert isinstance(reply, protocol.Unmounted)
        if reply.ending:
            client.wait_ended(places)


@podman.command()
@places_options
def credentials(root: Path | None, state: Path | None) -> None:
    """Take credentials from podman, for the layer store.

    podman 5.2 and later run firstbyte-podman-credentials, which is this, if registries.conf names
    it as additional-layer-store-auth-helper, and hand over as JSON on standard input what they
    pull an image with. The daemon keeps it in memory, for an hour.
    """
    given = sys.stdin.buffer.read(_MOST_CREDENTIALS + 1)
    try:
        if len(given) > _MOST_CREDENTIALS:
            raise ValueError(f"they have more than {_MOST_CREDENTIALS} bytes")
        handed = msgspec.json.decode(given, type=dict[str, protocol.HandedCredential])
    except (ValueError, msgspec.DecodeError, RecursionError) as error:
        raise DaemonError(
            f"what is on standard input is no credentials ({error})", hint="this is for podman"
        ) from error
    places = places_of(root, state)
    request = protocol.PodmanCredentialsRequest(handed)
    try:
        reply = client.ask(places, request, start=None, within=_HELPER_SECONDS)
    except TimeoutError as error:
        raise DaemonError(
            f"the daemon does not answer within {_HELPER_SECONDS:.0f} seconds"
        ) from error
    if reply is None:
        raise DaemonError(f"no daemon runs in {places.state}", hint="podman pulls as ever")


@podman.command()
@places_options
@json_option
def ls(root: Path | None, state: Path | None, as_json: bool) -> None:
    """List what is in the store, and how much of it is on this node."""
    places = places_of(root, state)
    act_as_root(places)
    reply = client.ask(places, protocol.StatusRequest(), start=None)
    assert reply is None or isinstance(reply, protocol.Status)
    images = _unserved(places) if reply is None else reply.podman
    if as_json:
        click.echo(json.dumps([msgspec.to_builtins(image) for image in images]))
        return
    for image in images:
        names = ", ".join(image.names) or "without a name"
        click.echo(f"{image.id[:12]} {names}: {progress_of(image)}")


def _require_shared_namespace(places: Places) -> None:
    """podman, which this command is for, sees what the daemon mounts. Raises DaemonError."""
    if rootless.user() is None:
        return
    status = client.ask(places, protocol.StatusRequest(), start=None)
    if isinstance(status, protocol.Status) and not rootless.is_same_namespace(status.pid):
        raise DaemonError(
            "podman has a new namespace, and does not see what the daemon mounts",
            hint="systemctl --user restart firstbyte, or firstbyte daemon --replace",
        )


def _graph_roots() -> list[str]:
    """Where podman keeps its containers, as the one that asks has it."""
    configured = read_storage_conf(find_storage_conf()).graph_root
    return sorted({str(usual_graph_root()), str(configured)})


def _unserved(places: Places) -> list[protocol.PodmanImage]:
    """What is in the store while no daemon runs."""
    return [
        protocol.PodmanImage(
            id=image.id,
            names=image.names or [],
            digest=image.original,
            state=protocol.UNSERVED,
            mode="",
            why="",
            local_bytes=0,
            total_bytes=0,
            problem=f"no daemon runs: {rootless.how_to_start()}",
        )
        for image in GraphRoot(places.podman_images).images()
    ]
