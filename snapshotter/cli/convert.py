"""`firstbyte convert`: an image whose layers can be read at random by themselves."""

from __future__ import annotations

import json

import click
import trio

from index.convert import DEFAULT_LEVELS
from index.tables import Codec
from snapshotter.cli import progress
from snapshotter.cli.connection import chosen_platform, connect, json_option, registry_options
from snapshotter.images.conversion import Converted
from snapshotter.images.conversion import convert as convert_image


@click.command()
@click.argument("source")
@click.argument("destination")
@click.option(
    "--codec",
    type=click.Choice(["zstd", "lz4"]),
    default="zstd",
    show_default=True,
    help="zstd is read by every OCI runtime; lz4 is the fastest, and FirstByte's only.",
)
@click.option(
    "--level",
    type=int,
    help="Compression level [default: "
    + ", ".join(f"{level} for {codec.name.lower()}" for codec, level in DEFAULT_LEVELS.items())
    + "].",
)
@registry_options
@json_option
def convert(
    source: str,
    destination: str,
    codec: str,
    level: int | None,
    platform: str | None,
    plain_http: bool,
    as_json: bool,
) -> None:
    """Copy an image with its layers recompressed into seekable frames, and its file index.

    SOURCE and DESTINATION are references, or oci:PATH[:TAG]. Of a multi-platform image the one for
    --platform is converted. Files, configuration and diffIDs stay the same, byte for byte.
    """
    chosen = Codec[codec.upper()]
    if level is None:
        level = DEFAULT_LEVELS[chosen]
    result = trio.run(_convert, source, destination, chosen, level, platform, plain_http, as_json)
    report = {
        "image": destination,
        "manifest": result.image.digest,
        "index": f"sha256:{result.index.digest.hex()}",
        "bytes_before": result.size_before,
        "bytes_after": result.size_after,
    }
    if as_json:
        click.echo(json.dumps(report, indent=2))
        return
    click.echo(f"{destination}@{result.image.digest}")
    click.echo(
        f"layers {progress.mb(result.size_before)} -> {progress.mb(result.size_after)}, "
        f"index {report['index']}"
    )


async def _convert(
    source: str,
    destination: str,
    codec: Codec,
    level: int,
    platform: str | None,
    plain_http: bool,
    as_json: bool,
) -> Converted:
    async with connect(plain_http=plain_http) as locations:
        origin, sink = locations.source(source), locations.sink(destination)
        image = await origin.resolve(chosen_platform(platform))
        with progress.show(quiet=as_json) as shown:
            size = sum(layer.size for layer in image.manifest.layers)
            task = shown.task(f"converting {image.name}", size)
            return await convert_image(
                origin, image, sink, codec=codec, level=level, on_progress=task.update
            )
