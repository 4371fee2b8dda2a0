"""`firstbyte gc` and `firstbyte df`: what is in the store, and what has to go."""

from __future__ import annotations

import json
from datetime import datetime
from typing import TYPE_CHECKING

import click
import msgspec

from snapshotter.cli.connection import json_option
from snapshotter.cli.mount import act_as_root, chosen_config, places_options
from snapshotter.cli.progress import mb
from snapshotter.daemon import client, protocol
from snapshotter.daemon.places import Places

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

_NAME = 19  # characters of a digest that tell it from others: "sha256:" and twelve digits


@click.command()
@click.option("--dry-run", is_flag=True, help="Delete nothing; say what would go, and why.")
@click.option(
    "--all",
    "everything",
    is_flag=True,
    help="Delete all that is not in use, although there is room.",
)
@places_options
@json_option
def gc(
    dry_run: bool, everything: bool, root: Path | None, state: Path | None, as_json: bool
) -> None:
    """Delete from the store what no image needs, and what its limit asks for.

    What is in use stays: images that are mounted or that containerd has, and what the kernel reads.
    The daemon does the same by itself when room is needed.
    """
    config = chosen_config(root, state)
    places = Places(config.root, config.state)
    act_as_root(places)
    request = protocol.CollectRequest(everything=everything, dry_run=dry_run)
    reply = client.ask(places, request, start=None)
    if reply is None:
        from snapshotter.daemon import offline  # gRPC's and SQLite's imports, only when needed

        reply = offline.collect(places, config, everything=everything, dry_run=dry_run)
    assert isinstance(reply, protocol.Collected)
    if as_json:
        click.echo(json.dumps({**_fields(reply), "dry_run": dry_run}))
        return
    for item in reply.garbage:
        name = f"{item.reference} " if item.reference else ""
        used = f", last used {_when(item.used_ns)}" if item.used_ns else ""
        click.echo(f"{item.kind} {name}{item.name}: {item.why} ({mb(item.bytes)}{used})")
    if dry_run:
        click.echo(f"{mb(sum(item.bytes for item in reply.garbage))} would be freed")
    else:
        click.echo(f"{mb(reply.freed)} freed")


@click.command()
@click.option("-l", "--layers", is_flag=True, help="Show the layers of each image, too.")
@places_options
@json_option
def df(layers: bool, root: Path | None, state: Path | None, as_json: bool) -> None:
    """Show what takes how much of the store.

    SIZE is what an image has when all of it is here, LOCAL how much of that is. Of what it takes on
    disk, other images have SHARED, too; EXCLUSIVE goes with it.
    """
    config = chosen_config(root, state)
    places = Places(config.root, config.state)
    act_as_root(places)
    reply = client.ask(places, protocol.DiskUsageRequest(), start=None)
    if reply is None:
        from snapshotter.daemon import offline

        reply = offline.usage(places, config)
    assert isinstance(reply, protocol.DiskUsage)
    if as_json:
        click.echo(json.dumps(_fields(reply)))
        return
    known = {layer.key: layer for layer in reply.layers}
    rows = [["IMAGE", "SIZE", "LOCAL", "SHARED", "EXCLUSIVE", "LAST USED", "IN USE BY"]]
    for image in reply.images:
        amounts = [mb(n) for n in (image.size, image.local, image.shared, image.exclusive)]
        used_by = ", ".join(image.users) or "-"
        rows.append([image.reference, *amounts, _when(image.used_ns), used_by])
        rows += [_layer_row(known[key]) for key in image.layers if layers and key in known]
    if layers:
        named = {key for image in reply.images for key in image.layers}
        rows += [_layer_row(layer) for layer in reply.layers if layer.key not in named]
    _print_table(rows)
    if reply.unnamed:
        click.echo(f"{mb(reply.unnamed)} are of no image: firstbyte gc deletes what is not in use")
    click.echo(f"{mb(reply.used)} of {mb(reply.limit)}, {mb(reply.free)} free on the disk")


def _layer_row(layer: protocol.LayerUsage) -> list[str]:
    name = layer.digests[0][:_NAME] if layer.digests else f"key {layer.key[:12]}"
    shared = layer.disk if layer.images > 1 else 0
    amounts = [mb(n) for n in (layer.size, layer.local, shared, layer.disk - shared)]
    return [f"  {name}", *amounts, _when(layer.used_ns), "yes" if layer.in_use else "-"]


def _print_table(rows: Sequence[Sequence[str]]) -> None:
    """Texts to the left, amounts to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [
            cell.rjust(width) if 0 < number < 5 else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        click.echo("  ".join(cells).rstrip())


def _when(nanoseconds: int) -> str:
    return f"{datetime.fromtimestamp(nanoseconds // 10**9).astimezone():%Y-%m-%d %H:%M}"


def _fields(reply: protocol.Collected | protocol.DiskUsage) -> dict[str, object]:
    fields: dict[str, object] = msgspec.to_builtins(reply)
    del fields["type"]  # the control protocol's tag
    return fields
