"""`firstbyte mount`, `umount`, `status` and `daemon`."""

from __future__ import annotations

import gc
import json
import os
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from snapshotter.cli import progress
from snapshotter.cli.connection import (
    config_option,
    configuration,
    index_option,
    json_option,
    plain_http_option,
    platform_option,
)
from snapshotter.daemon import client, protocol
from snapshotter.daemon.config import DEFAULT_ROOT, DEFAULT_STATE, SOCKET_NAME, Config
from snapshotter.daemon.errors import DaemonError
from snapshotter.daemon.leftovers import is_ours
from snapshotter.daemon.logs import log_to_stderr
from snapshotter.daemon.places import Places
from snapshotter.mounts.table import mount_at
from snapshotter.podman import rootless
from snapshotter.podman.storage_conf import find_storage_conf, read_storage_conf
from snapshotter.registry.reference import LAYOUT_PREFIX
from snapshotter.store.durable import make_directory

if TYPE_CHECKING:
    from collections.abc import Callable

    from snapshotter.cli.progress import Progress, Task

_DIRECTORY = click.Path(path_type=Path, readable=False)  # who may do what is checked elsewhere


def places_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """--config, --root and --state, which say which instance on the node is meant."""
    command = click.option(
        "--state",
        type=_DIRECTORY,
        help=f"Where sockets, mounts and the log are [default: as configured, {DEFAULT_STATE}].",
    )(command)
    command = click.option(
        "--root",
        type=_DIRECTORY,
        help=f"Where images' data is kept [default: as configured, {DEFAULT_ROOT}].",
    )(command)
    return config_option(command)


@click.command()
@click.argument("reference")
@click.argument("directory", type=_DIRECTORY)
@index_option
@click.option(
    "--mode",
    type=click.Choice(["auto", "native", "erofs", "fuse"]),
    default="auto",
    show_default=True,
    help="native: the kernel on local files, when all of it is local; erofs: the kernel on data "
    "that the daemon serves; fuse: the daemon.",
)
@click.option("--wait-local", is_flag=True, help="Return when all of the image is on this node.")
@places_options
@platform_option
@plain_http_option
@json_option
def mount(
    reference: str,
    directory: Path,
    index_file: Path | None,
    mode: str,
    wait_local: bool,
    root: Path | None,
    state: Path | None,
    platform: str | None,
    plain_http: bool,
    as_json: bool,
) -> None:
    """Mount an image on an empty directory, read-only, before it has been downloaded.

    REFERENCE is an image in a registry, or oci:PATH[:TAG] for one in an OCI layout. What is read
    is fetched; the rest follows in the background. A daemon is started if none runs, and ends by
    itself after the last umount.
    """
    require_root()
    request = protocol.MountRequest(
        reference=absolute_layout(reference),
        target=absolute(directory),
        platform=platform or "",
        plain_http=plain_http,
        index=absolute(index_file) if index_file else "",
        wait_local=wait_local,
        mode=mode,
    )
    reply = ask_with_progress(request, root, state, quiet=as_json)
    assert isinstance(reply, protocol.Mounted)
    if as_json:
        click.echo(json.dumps(msgspec.to_builtins(reply.mount)))
    else:
        click.echo(f"mounted {reply.mount.reference} at {reply.mount.target}")


@click.command()
@click.argument("directory", type=_DIRECTORY)
@places_options
def umount(directory: Path, root: Path | None, state: Path | None) -> None:
    """Take down the image mounted on a directory.

    Fails while a program uses a file in it.
    """
    require_root()
    places = places_of(root, state)
    target = absolute(directory)
    request = protocol.UmountRequest(target)
    reply = client.ask(places, request, start=None)
    if reply is None:
        _require_ours(places, Path(target))
        try:
            reply = client.ask(places, request, start=chosen_config(root, state))
        except DaemonError:
            if mount_at(Path(target)) is not None:
                raise
            return  # the daemon that was started found it dead, and took it down
    assert isinstance(reply, protocol.Unmounted)
    if reply.ending:
        client.wait_ended(places)


@click.command()
@places_options
@json_option
def status(root: Path | None, state: Path | None, as_json: bool) -> None:
    """Show what is mounted, and how much of it is on this node."""
    places = places_of(root, state)
    act_as_root(places)
    reply = client.ask(places, protocol.StatusRequest(), start=None)
    if reply is None:
        reply = protocol.Status(pid=0, root=str(places.root), state=str(places.state), mounts=[])
    assert isinstance(reply, protocol.Status)
    if as_json:
        fields = msgspec.to_builtins(reply)
        del fields["type"]  # the control protocol's tag
        click.echo(json.dumps(fields))
        return
    click.echo(f"daemon: {f'process {reply.pid}' if reply.pid else 'not running'}")
    for mounted in reply.mounts:
        click.echo(f"{mounted.target}: {mounted.reference}, {progress_of(mounted)}")
    for image in reply.podman:
        click.echo(f"podman: {', '.join(image.names) or image.id[:12]}, {progress_of(image)}")
    if reply.containerd is not None:
        _print_containerd(reply.containerd)
    if reply.store is not None:
        click.echo(_store_line(reply.store))
    if reply.retries or reply.damaged:
        click.echo(
            f"requests made again: {reply.retries}, damaged chunks and spans: {reply.damaged}"
        )


@click.command()
@click.option(
    "--address",
    metavar="SOCKET",
    type=click.Path(path_type=Path, dir_okay=False),
    help=f"Where containerd finds the snapshotter [default: as configured, STATE/{SOCKET_NAME}].",
)
@click.option("--replace", is_flag=True, help="Take over from a daemon that runs.")
@click.option("--stop", is_flag=True, help="End the daemon that runs, and unmount everything.")
@places_options
def daemon(
    address: Path | None, replace: bool, stop: bool, root: Path | None, state: Path | None
) -> None:
    """Run the daemon of a node in the foreground: containerd's snapshotter, and images on
    directories.

    With SIGINT it ends and unmounts everything. With SIGTERM, and if it dies, mounts stay: what is
    read waits for the next daemon, which goes on. `firstbyte mount` starts a daemon by itself where
    none runs; that one does not serve containerd.
    """
    chosen = chosen_config(root, state)
    places = Places(chosen.root, chosen.state)
    act_as_root(places)
    log_to_stderr()
    if stop:
        # By a daemon that is started for that if none runs.
        client.ask(places, protocol.StopRequest(), start=chosen)
        client.wait_ended(places)
        return
    if address is not None:
        chosen = msgspec.structs.replace(chosen, address=Path(absolute(address)))
    gc.disable()  # `process.run` enables it: to look for cycles during imports takes 25 ms
    import trio  # what the other commands leave to the daemon

    from snapshotter.daemon import process

    trio.run(partial(process.run, chosen, stay=True, ready=lambda: None, replace=replace))


def _require_ours(places: Places, target: Path) -> None:
    """No daemon runs. Is it for a new one to take this mount down?"""
    entry = mount_at(target)
    if entry is None or not is_ours(entry, places):
        raise DaemonError(
            f"no image is mounted at {target}: no daemon runs in {places.state}",
            hint="was it mounted with another --state?",
        )


def ask_with_progress(
    request: protocol.Request, root: Path | None, state: Path | None, *, quiet: bool
) -> object:
    """The daemon's reply, with its progress shown meanwhile; one is started if none runs.

    Raises FirstByteError.
    """
    with progress.show(quiet=quiet) as shown:
        return client.ask(
            places_of(root, state),
            request,
            start=chosen_config(root, state),
            on_progress=Bars(shown).update,
        )


class Bars:
    """Shows each kind of work that the daemon reports as a task of its own."""

    def __init__(self, shown: Progress) -> None:
        self._shown = shown
        self._tasks: dict[str, Task] = {}

    def update(self, event: protocol.Progress) -> None:
        task = self._tasks.get(event.task)
        if task is None:
            task = self._tasks[event.task] = self._shown.task(event.task, event.total)
        task.update(event.done, event.total)


def _print_containerd(status: protocol.ContainerdStatus) -> None:
    click.echo(
        f"containerd at {status.address}: {status.lazy_layers} lazy layers, "
        f"{status.ordinary_layers} ordinary ones, {status.containers} containers"
    )
    for image in status.images:
        click.echo(f"{image.reference}: {image.layers} layers, {progress_of(image)}")
    for fallback in status.fallbacks:
        when = datetime.fromtimestamp(fallback.at_ns // 10**9).astimezone()
        click.echo(
            f"not lazy: {fallback.reference or 'an image without labels'}: {fallback.reason} "
            f"({fallback.kind}, {fallback.count} times, last at {when:%Y-%m-%d %H:%M:%S})"
        )


def _store_line(store: protocol.StoreStatus) -> str:
    line = f"store: {progress.mb(store.used)} of {progress.mb(store.limit)}"
    line += f", {progress.mb(store.free)} free on its disk"
    return f"{line}; {store.problem}" if store.problem else line


_Shown = protocol.MountStatus | protocol.ImageStatus | protocol.PodmanImage


def progress_of(shown: _Shown) -> str:
    """One line on how an image is served, and how much of it is here."""
    if shown.state == protocol.UNSERVED:
        return f"{shown.state}; {shown.problem}"
    share = 100 * shown.local_bytes // shown.total_bytes if shown.total_bytes else 100
    line = (
        f"{shown.state} ({_mode_of(shown)}), {progress.mb(shown.local_bytes)} of "
        f"{progress.mb(shown.total_bytes)} ({share} %) on this node"
    )
    return f"{line}; {shown.problem}" if shown.problem else line


def _mode_of(shown: _Shown) -> str:
    return f"{shown.mode}: {shown.why}" if shown.why else shown.mode


def require_root() -> None:
    """For what is to be seen by everybody. Raises DaemonError."""
    if rootless.is_outside():
        raise DaemonError(
            "images are mounted by root alone",
            hint="use sudo, or podman unshare if the mount is for podman",
        )


def act_as_root(places: Places) -> None:
    """For what needs to be root: a user becomes that in podman's namespaces, for whose podman the
    command works then. Raises FirstByteError."""
    if not rootless.is_outside():
        return
    named = read_storage_conf(find_storage_conf()).stores
    for store in (places.podman_images, places.podman_layers):
        if str(store) in named:  # no podman starts without, and the daemon is about to need one
            make_directory(store)
    rootless.enter()


def chosen_config(root: Path | None, state: Path | None) -> Config:
    """The configuration, with what the command line says instead."""
    config = configuration()
    return msgspec.structs.replace(
        config,
        root=Path(absolute(root or config.root)),
        state=Path(absolute(state or config.state)),
    )


def places_of(root: Path | None, state: Path | None) -> Places:
    """Where the instance that is meant keeps things."""
    config = chosen_config(root, state)
    return Places(config.root, config.state)


def absolute(path: Path) -> str:
    """The path as the mount table has it: absolute, symbolic links resolved."""
    return os.path.realpath(path)


def absolute_layout(reference: str) -> str:
    """The daemon has a working directory of its own."""
    if not reference.startswith(LAYOUT_PREFIX):
        return reference
    path, colon, tag = reference.removeprefix(LAYOUT_PREFIX).partition(":")
    return f"{LAYOUT_PREFIX}{os.path.realpath(path)}{colon}{tag}"
