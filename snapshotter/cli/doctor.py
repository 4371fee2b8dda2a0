"""`firstbyte doctor`: what is wrong on this node, and how to mend it."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import click

from index.errors import FirstByteError
from snapshotter.cli.connection import json_option
from snapshotter.cli.mount import act_as_root
from snapshotter.daemon import client, config, protocol
from snapshotter.daemon.places import Places
from snapshotter.doctor import podman_facts
from snapshotter.doctor.containerd import examine
from snapshotter.doctor.facts import LocalFiles, collect
from snapshotter.doctor.findings import any_problem
from snapshotter.doctor.podman import examine as examine_podman
from snapshotter.doctor.recommended import Expected

if TYPE_CHECKING:
    from snapshotter.doctor.findings import Finding
    from snapshotter.doctor.running import Served

_PATH = click.Path(path_type=Path, readable=False)
_ANSWER_SECONDS = 15.0  # the daemon's status, when the machine is busy; a guess


@click.group()
def doctor() -> None:
    """Look for what keeps images from being served lazily."""


@doctor.command()
@click.option(
    "--config",
    "containerd_config",
    type=_PATH,
    default=Path("/etc/containerd/config.toml"),
    show_default=True,
    help="containerd's configuration.",
)
@click.option("--address", type=_PATH, help="The daemon's socket [default: as configured].")
@click.option(
    "--containerd-address",
    type=_PATH,
    default=Path("/run/containerd/containerd.sock"),
    show_default=True,
    help="containerd's socket.",
)
@click.option("--root", type=_PATH, help="Where images' data is kept [default: as configured].")
@click.option("--state", type=_PATH, help="Where sockets and mounts are [default: as configured].")
@json_option
def containerd(
    containerd_config: Path,
    address: Path | None,
    containerd_address: Path,
    root: Path | None,
    state: Path | None,
    as_json: bool,
) -> None:
    """Check that containerd uses FirstByte, and gets what it needs from it.

    Says of every check how it stands, and what to do where something is wrong. The exit status is
    1 if there is a problem; warnings and skipped checks are none.
    """
    own = config.load_system()
    places = Places(_absolute(root or own.root), _absolute(state or own.state))
    expected = Expected(
        address=_absolute(address) if address else _socket(own, places),
        root=places.root,
        registry_config_path=own.registry.config_path,
    )
    facts = collect(expected, _absolute(containerd_address), _served(places))
    _tell(examine(facts, expected, _absolute(containerd_config), LocalFiles()), as_json=as_json)


@doctor.command()
@click.option(
    "--storage-conf",
    type=_PATH,
    help="podman's storage.conf [default: where podman looks for it].",
)
@click.option("--root", type=_PATH, help="Where images' data is kept [default: as configured].")
@click.option("--state", type=_PATH, help="Where sockets and mounts are [default: as configured].")
@json_option
def podman(storage_conf: Path | None, root: Path | None, state: Path | None, as_json: bool) -> None:
    """Check that podman finds FirstByte's stores, and which of them it can use.

    Says of every check how it stands, and what to do where something is wrong. The exit status is
    1 if there is a problem; warnings and skipped checks are none.
    """
    own = config.load(None)
    places = Places(_absolute(root or own.root), _absolute(state or own.state))
    cannot_enter = _enter_namespace(places)
    status = _status(places)
    daemon = 0 if isinstance(status, str) else status.pid
    facts = podman_facts.collect(
        storage_conf,
        status if isinstance(status, str) else _unserved(status),
        cannot_enter or podman_facts.look_at_namespace(daemon),
        own.registry.registries_conf,
    )
    _tell(examine_podman(facts, places.podman_images, places.podman_layers), as_json=as_json)


def _enter_namespace(places: Places) -> str:
    """Look from where a user's podman looks, or tell why that cannot be."""
    try:
        act_as_root(places)
    except FirstByteError as error:
        return str(error)
    return ""


def _unserved(status: protocol.Status) -> list[tuple[str, str]]:
    """The images of podman's store that cannot be read, and why."""
    return [
        (next(iter(image.names), image.id[:12]), image.problem)
        for image in status.podman
        if image.state == protocol.UNSERVED
    ]


def _tell(findings: list[Finding], *, as_json: bool) -> NoReturn:
    if as_json:
        click.echo(json.dumps({"findings": [_fields(finding) for finding in findings]}))
    else:
        for finding in findings:
            _show(finding)
    sys.exit(1 if any_problem(findings) else 0)


def _socket(own: config.Config, places: Places) -> Path:
    """--state moves the socket, unless the configuration says where it is."""
    return own.address or places.state / config.SOCKET_NAME


def _served(places: Places) -> Served | str:
    """The daemon's account of what it did for containerd, or why there is none."""
    status = _status(places)
    if isinstance(status, str):
        return status
    if status.containerd is None:
        return "the daemon does not serve containerd"
    return status.containerd


def _status(places: Places) -> protocol.Status | str:
    """The daemon's account of itself, or why there is none."""
    if os.geteuid():
        return "only root may ask the daemon"
    try:
        reply = client.ask(places, protocol.StatusRequest(), start=None, within=_ANSWER_SECONDS)
    except TimeoutError:
        return f"the daemon does not answer within {_ANSWER_SECONDS:.0f} seconds"
    except FirstByteError as error:
        return str(error)
    if reply is None:
        return f"no daemon runs in {places.state}"
    assert isinstance(reply, protocol.Status)
    return reply


def _show(finding: Finding) -> None:
    click.echo(f"{finding.state.value}: {finding.check}: {finding.found}")
    for line in finding.mend.splitlines():
        click.echo(f"    {line}")


def _fields(finding: Finding) -> dict[str, str]:
    return {
        "check": finding.check,
        "state": finding.state.value,
        "found": finding.found,
        "mend": finding.mend,
    }


def _absolute(path: Path) -> Path:
    return Path(os.path.abspath(path))
