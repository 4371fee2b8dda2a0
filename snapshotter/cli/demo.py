"""`firstbyte demo`: the main job, shown."""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING

import click

from snapshotter.demo.interruption import InterruptedBySignal
from snapshotter.demo.progress import Narrator
from snapshotter.demo.ready import HttpProbe, LineProbe, SignOfLifeProbe
from snapshotter.demo.run import Workload, run_demo, sample_workload

if TYPE_CHECKING:
    from collections.abc import Callable

    from snapshotter.demo.ready import Probe
    from snapshotter.demo.ways import Runtime

_HTTP = re.compile(r"(\d{1,5})(/\S*)?")
_PORTS = range(1, 65536)


@click.command()
@click.argument("image", required=False)
@click.option(
    "--ready-http",
    metavar="PORT[/PATH]",
    help="Ready when this is answered on loopback, with status 200 and a body.",
)
@click.option("--ready-line", metavar="REGEX", help="Ready when a line of the output matches this.")
@click.option(
    "--within",
    metavar="SECONDS",
    type=click.FloatRange(min=0, min_open=True),
    default=300.0,
    show_default=True,
    help="How long the workload may take to get ready.",
)
@click.option(
    "--link",
    metavar="MBIT",
    type=click.FloatRange(min=0, min_open=True),
    default=200.0,
    show_default=True,
    help="Bandwidth between the registry and this machine, in Mbit/s.",
)
@click.option(
    "--runtime",
    type=click.Choice(["runc", "containerd", "podman"]),
    default="runc",
    show_default=True,
    help="What starts the container: runc, on an image that FirstByte has mounted; a containerd "
    "whose snapshotter is FirstByte; or podman, from FirstByte's image store.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the timeline as one JSON object.")
def demo(
    image: str | None,
    ready_http: str | None,
    ready_line: str | None,
    within: float,
    link: float,
    runtime: Runtime,
    as_json: bool,
) -> None:
    """Start a container from an image that is not here yet.

    Starts a registry behind a link of limited bandwidth, puts an image into it (IMAGE, or a sample
    made from this machine's packages), starts it lazily, and waits until the workload in it is
    ready; then does the same by a full pull, and prints both timelines. IMAGE is
    run as it is, in the host's network, and counts as ready with its first line of output unless
    told otherwise.

    Daemon and containerd are its own, next to any other on the machine. Nothing it starts, mounts
    or writes is left behind.
    """
    if image is None:
        if ready_http or ready_line:
            raise click.UsageError("the sample image knows when it is ready: give an IMAGE, too")
        workload = sample_workload(within, link, runtime)
    else:
        workload = Workload(image, _probe(ready_http, ready_line), {}, within, link, runtime)
    try:
        timeline = run_demo(workload, Narrator(sys.stderr))
    except InterruptedBySignal as interrupted:
        click.echo(f"firstbyte: {interrupted}", err=True)
        sys.exit(128 + interrupted.number)
    click.echo(timeline.as_json() if as_json else timeline.as_text())


def _probe(ready_http: str | None, ready_line: str | None) -> Callable[[], Probe]:
    if ready_http and ready_line:
        raise click.UsageError("--ready-http and --ready-line exclude each other")
    if ready_http:
        match = _HTTP.fullmatch(ready_http)
        if not match or int(match[1]) not in _PORTS:
            raise click.BadParameter(f"{ready_http!r} is not PORT or PORT/PATH")
        port, path = int(match[1]), match[2] or "/"
        return lambda: HttpProbe(port, path)
    if ready_line:
        try:
            pattern = re.compile(ready_line)
        except re.error as error:
            raise click.BadParameter(f"{ready_line!r} is no pattern: {error}") from error
        return lambda: LineProbe(pattern)
    return SignOfLifeProbe
