"""`firstbyte bench`: measurements, with the conditions they were taken under."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from snapshotter.bench import building, corpus, fio, first_read, mounting, opening, reading
from snapshotter.bench import handover as many_mounts
from snapshotter.bench.conditions import Conditions
from snapshotter.bench.errors import BenchError
from snapshotter.bench.images import FORMS, GZIP, write_image
from snapshotter.bench.layers import many_layers
from snapshotter.bench.link.link import DistantRegistry
from snapshotter.bench.link.profiles import LinkProfile
from snapshotter.cli import cold_start
from snapshotter.cli.benching import bench_workspace, output_options, say, show

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from snapshotter.bench.tables import Table

_MOUNTED_FILES = 1_000_000
_OPENED_FILES = (28_000, _MOUNTED_FILES)  # a large language runtime, and the largest images known
_LAYERS = (127, 200)  # docker's limit, and beyond
_SAMPLES = 5
_POLL_SECONDS = 0.02


def _options(command: Callable[..., Any]) -> Callable[..., Any]:
    """What every benchmark of files takes."""
    return click.option(
        "--corpus",
        "directories",
        metavar="DIR",
        type=click.Path(exists=True, file_okay=False, path_type=Path),
        multiple=True,
        help="Directories to measure with, each a layer [default: some of this machine's "
        f"programs, {corpus.DEFAULT_LIMIT >> 20} MiB of each directory].",
    )(output_options(_SAMPLES)(command))


@click.group()
def bench() -> None:
    """Measure how fast FirstByte is on this machine.

    Needs root, and a while. Nothing it makes, mounts or starts is left behind.
    """


for command in cold_start.COMMANDS:
    bench.add_command(command)


@bench.command()
@_options
def index(directories: tuple[Path, ...], samples: int, as_json: bool, as_markdown: bool) -> None:
    """Building, opening, checking and mounting file indexes, and their size."""
    with bench_workspace(computing=True) as workspace:
        conditions = Conditions(workspace.path)
        layers = _pack(directories, workspace.path)
        images = []
        for number, form in enumerate(FORMS):
            say(f"compressing the layers: {form.name}")
            images.append(write_image(workspace.path / f"image-{number}", form, layers))
        gzip = images[FORMS.index(GZIP)]
        results: list[Table] = []
        say("building indexes")
        results.append(building.throughput(images, samples))
        say("building indexes, part by part")
        results.append(building.parts(gzip, layers, samples))
        results.append(building.sizes(images))
        say("compressing the layers into frames of several sizes")
        results.append(building.frames(layers, gzip.size))
        say(f"opening indexes of up to {max(_OPENED_FILES)} files")
        results += opening.opening(_OPENED_FILES, workspace.path, samples)
        say(f"mounting an image of {_MOUNTED_FILES} files")
        results.append(mounting.mounting(_MOUNTED_FILES, workspace, samples))
        show([conditions.table(), *results], as_json, as_markdown)


@bench.command()
@_options
def read(directories: tuple[Path, ...], samples: int, as_json: bool, as_markdown: bool) -> None:
    """Reading through a lazy mount in each mode, against overlayfs on the same disk."""
    with bench_workspace(computing=True) as workspace:
        conditions = Conditions(workspace.path)
        layers = _pack(directories, workspace.path)
        say(f"compressing the layers: {GZIP.name}")
        image = write_image(workspace.path / "image", GZIP, layers)
        say("reading a fully local image")
        if not fio.installed():
            say("without fio, which is not installed: 'scripts/setup bench' does that")
        results = reading.compare(image, workspace, samples)
        say("reading an image of which nothing is local")
        results.append(first_read.first_read(image, workspace, samples))
        show([conditions.table(), *results], as_json, as_markdown)


@bench.command()
@click.option(
    "--images",
    type=click.IntRange(min=2),
    default=20,
    show_default=True,
    help="How many images are mounted.",
)
@click.option(
    "--files",
    type=click.IntRange(min=1),
    default=500_000,
    show_default=True,
    help="How many files they have in all.",
)
@output_options(_SAMPLES)
def handover(images: int, files: int, samples: int, as_json: bool, as_markdown: bool) -> None:
    """How long readers wait while the daemon is replaced, or dies; its memory with many images."""
    with bench_workspace(computing=True) as workspace:
        conditions = Conditions(workspace.path)
        say(f"mounting {images} images with {files} files")
        results = many_mounts.handover(workspace, images, files, samples)
        show([conditions.table(), *results], as_json, as_markdown)


@bench.command()
@click.option(
    "--layers",
    "counts",
    metavar="N",
    type=click.IntRange(min=2),
    multiple=True,
    default=_LAYERS,
    show_default=True,
    help="How many layers are many; may be given several times.",
)
@output_options(_SAMPLES)
def layers(counts: tuple[int, ...], samples: int, as_json: bool, as_markdown: bool) -> None:
    """Starting an image of many layers with containerd, against the same in one."""
    with bench_workspace() as workspace:
        conditions = Conditions(workspace.path)
        say(f"starting images of 1, {', '.join(map(str, counts))} layers")
        results = many_layers(workspace, counts, samples)
        show([conditions.table(), *results], as_json, as_markdown)


@bench.command(context_settings={"ignore_unknown_options": True})
@click.option(
    "--profile",
    metavar="LINK",
    default="200mbit-20ms",
    show_default=True,
    help="Bandwidth each way and round-trip time, and optionally a share of failed requests: "
    "20mbit-150ms-1%.",
)
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def link(profile: str, command: tuple[str, ...]) -> None:
    """Run COMMAND next to an empty registry behind a network link.

    COMMAND finds in its environment where the registry is: FIRSTBYTE_LINK is its HOST:PORT over
    the link, FIRSTBYTE_DIRECT the same registry without it, to put images in. Both are on loopback.
    What the link has carried is told at the end. Needs root.
    """
    chosen = LinkProfile.parse(profile)
    with bench_workspace() as workspace:
        registry = DistantRegistry(workspace, chosen)
        hosts = {"FIRSTBYTE_LINK": registry.host, "FIRSTBYTE_DIRECT": registry.direct}
        try:
            process = subprocess.Popen(command, env={**os.environ, **hosts})
        except OSError as error:
            raise BenchError(f"cannot run {command[0]}: {error.strerror}") from error
        try:
            while process.poll() is None:
                workspace.interruption.sleep(_POLL_SECONDS)
        finally:
            process.terminate()
            process.wait()
        carried = registry.link.carried()
        say(
            f"{carried.down / 1e6:.3f} MB down, {carried.up / 1e6:.3f} MB up, {carried.requests} "
            f"requests ({carried.failed} failed), {carried.connections} connections"
        )
    sys.exit(process.returncode)


def _pack(directories: Sequence[Path], workspace: Path) -> tuple[corpus.RawLayer, ...]:
    """The corpus as tars: what was asked for as a whole, or a part of the usual directories."""
    limit = None if directories else corpus.DEFAULT_LIMIT
    chosen = directories or corpus.default_directories()
    say(f"packing {', '.join(map(str, chosen))}")
    return corpus.pack(chosen, limit, workspace)
