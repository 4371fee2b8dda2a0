"""`firstbyte why`: where the time of a start went."""

from __future__ import annotations

import json
import os
from pathlib import Path

import click
import msgspec

from index.extents import FileExtents
from index.file import FileIndex
from snapshotter.cli.connection import json_option
from snapshotter.cli.mount import act_as_root, places_of, places_options
from snapshotter.cli.start_report import lines, report
from snapshotter.cli.start_timeline import draw
from snapshotter.daemon import client, protocol
from snapshotter.daemon.errors import DaemonError
from snapshotter.store.indexes import index_path


@click.command()
@click.argument("image", metavar="IMAGE|DIR")
@click.option(
    "--svg",
    metavar="FILE",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Draw the start, too: requests on the wire by class, and stalls, over time.",
)
@places_options
@json_option
def why(image: str, svg: Path | None, root: Path | None, state: Path | None, as_json: bool) -> None:
    """Show where the time of an image's start went.

    What it took to open the image, which files were waited for and how long, what was on the wire
    meanwhile, and what was fetched in vain. IMAGE is a reference or a digest of an image that is
    open, DIR where one is mounted. The daemon records the first five minutes after it was opened.
    """
    places = places_of(root, state)
    act_as_root(places)
    name = os.path.realpath(image) if Path(image).is_dir() else image
    reply = client.ask(places, protocol.WhyRequest(name), start=None)
    if reply is None:
        raise DaemonError("no daemon runs, so nothing is on record")
    assert isinstance(reply, protocol.StartRecord)
    path = index_path(places.root, bytes.fromhex(reply.index))
    try:
        files = FileExtents(FileIndex.open(path).tree)
    except FileNotFoundError as error:
        raise DaemonError(f"the image has been removed meanwhile: {path} is gone") from error
    found = report(reply, files.at)
    if svg is not None:
        svg.write_text(draw(reply))
    if as_json:
        click.echo(json.dumps(msgspec.to_builtins(found)))
        return
    for line in lines(found):
        click.echo(line)
    if svg is not None:
        click.echo(f"drawn: {svg}")
