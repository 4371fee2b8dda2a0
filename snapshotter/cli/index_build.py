"""`firstbyte index build`: an image's file index, and perhaps a startup pack."""

from __future__ import annotations

import json
import os
import tempfile
import time
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click
import trio

from index.tables import CHUNK_SIZE
from snapshotter.cli import progress
from snapshotter.cli.connection import (
    chosen_platform,
    connect,
    json_option,
    plain_http_option,
    platform_option,
)
from snapshotter.cli.mount import places_of, places_options
from snapshotter.cli.profile_lookup import node_profile, pushed_profile, read_profile
from snapshotter.images import artifact
from snapshotter.images.indexing import build_index
from snapshotter.images.packing import ChunkCollector, build_pack
from snapshotter.images.profiles import check_of

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from index.file import FileIndex
    from index.profile import Profile
    from snapshotter.registry.image import ImageSource, ResolvedImage

SUFFIX = ".fbx"
"""Of files that hold an index."""

PACK_SUFFIX = ".fbp"
"""Of files that hold a startup pack."""


@click.command()
@click.argument("reference")
@click.option("--push", is_flag=True, help="Attach the index to the image, for everybody.")
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write the index to this file [default, without --push: NAME.fbx here].",
)
@click.option(
    "--profile",
    "profile_file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Make a startup pack, too: of what this startup profile says.",
)
@click.option(
    "--profile-from-node",
    "from_node",
    is_flag=True,
    help="The same, of the profile that this node has recorded of the image.",
)
@click.option(
    "--profile-from-registry",
    "from_registry",
    is_flag=True,
    help="The same, of the profiles that nodes have pushed.",
)
@places_options
@platform_option
@plain_http_option
@json_option
def build(
    reference: str,
    push: bool,
    output: Path | None,
    profile_file: Path | None,
    from_node: bool,
    from_registry: bool,
    root: Path | None,
    state: Path | None,
    platform: str | None,
    plain_http: bool,
    as_json: bool,
) -> None:
    """Read all layers of an image once and build its file index.

    REFERENCE is an image in a registry, or oci:PATH[:TAG] for one in an OCI layout. The image stays
    as it is.

    With a startup profile, the chunks that a start reads are put into a startup pack, which is
    pushed with the index, or written to FILE.fbp beside it: nodes then fetch all of them with one
    request.
    """
    if (profile_file is not None) + from_node + from_registry > 1:
        raise click.UsageError("one startup profile at a time")

    async def profile_of(source: ImageSource, image: ResolvedImage) -> Profile | None:
        if profile_file is not None:
            return read_profile(profile_file)
        if from_node:
            return node_profile(places_of(root, state), image)
        return await pushed_profile(source, image) if from_registry else None

    report = trio.run(_build, reference, push, output, profile_of, platform, plain_http, as_json)
    _print_report(report, as_json)


async def _build(
    reference: str,
    push: bool,
    output: Path | None,
    profile_of: Callable[[ImageSource, ResolvedImage], Awaitable[Profile | None]],
    platform: str | None,
    plain_http: bool,
    as_json: bool,
) -> dict[str, object]:
    started = time.monotonic()
    async with AsyncExitStack() as held:
        locations = await held.enter_async_context(connect(plain_http=plain_http))
        source = locations.source(reference)
        image = await source.resolve(chosen_platform(platform))
        profile = await profile_of(source, image)
        collected = None
        if profile is not None:
            check_of(profile, image)
            collected = held.enter_context(ChunkCollector(profile))
        size = sum(layer.size for layer in image.manifest.layers)
        with progress.show(quiet=as_json) as shown:
            task = shown.task(f"indexing {image.name}", size)
            built = await build_index(
                source,
                image,
                on_progress=task.update,
                on_raw=collected.writer if collected else lambda _: None,
            )
            packed = await trio.to_thread.run_sync(built.packed)
            pack = None
            if collected is not None:
                task = shown.task("packing", len(collected.places) * CHUNK_SIZE)
                pack = await trio.to_thread.run_sync(
                    partial(build_pack, built, collected, on_progress=task.update)
                )
        report = describe(built) | {
            "image": image.name,
            "manifest": image.descriptor.digest,
            "image_bytes": size,
            "index_bytes": len(packed),
            "seconds": round(time.monotonic() - started, 3),
        }
        if pack is not None and collected is not None:
            report |= {"pack_bytes": len(pack), "pack_chunks": len(collected.places)}
        if output is None and not push:
            output = Path(f"{_file_name(reference)}{SUFFIX}")
        if output is not None:
            await trio.to_thread.run_sync(_write, output, packed)
            report["file"] = str(output)
            if pack is not None:
                await trio.to_thread.run_sync(_write, output.with_suffix(PACK_SUFFIX), pack)
                report["pack_file"] = str(output.with_suffix(PACK_SUFFIX))
        if push:
            sink = locations.sink(reference)
            pushed = await artifact.publish(sink, image.descriptor, packed, built.digest, pack=pack)
            report["artifact"] = pushed.digest
    return report


def _file_name(reference: str) -> str:
    """`host:5000/team/app:1.2` and `oci:/images/app:1.2` are `app-1.2`."""
    name = reference.partition("@")[0].rstrip("/").rpartition("/")[2]
    return name.removeprefix("oci:").replace(":", "-") or "image"


def _write(path: Path, data: bytes) -> None:
    """All of the file or nothing of it."""
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            os.fchmod(file.fileno(), 0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def describe(opened: FileIndex) -> dict[str, object]:
    """What an index holds, for people and scripts."""
    return {
        "digest": f"sha256:{opened.digest.hex()}",
        "inodes": opened.tree.inode_count,
        "sections": opened.section_sizes,
        "layers": [
            {
                "digest": f"sha256:{table.digest.hex()}",
                "diff_id": f"sha256:{table.diff_id.hex()}",
                "codec": table.codec.name.lower(),
                "blob_bytes": table.blob_size,
                "raw_bytes": table.raw_size,
                "chunks": table.chunk_count,
                "seek_points": len(table.raw_offsets),
                "windows": bytes(table.window_flags).count(1),
            }
            for table in opened.layers
        ],
    }


def _print_report(report: dict[str, object], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(report, indent=2))
        return
    index_bytes, image_bytes = report["index_bytes"], report["image_bytes"]
    assert isinstance(index_bytes, int)
    assert isinstance(image_bytes, int)
    click.echo(f"index {report['digest']}")
    click.echo(
        f"{report['inodes']} inodes, {progress.mb(image_bytes)} of layers, index "
        f"{index_bytes / 1e3:.1f} kB ({index_bytes / max(image_bytes, 1):.2%}), "
        f"built in {report['seconds']} s"
    )
    if "pack_bytes" in report:
        pack_bytes = report["pack_bytes"]
        assert isinstance(pack_bytes, int)
        click.echo(f"startup pack of {report['pack_chunks']} chunks, {progress.mb(pack_bytes)}")
    if "file" in report:
        click.echo(f"written to {report['file']}")
    if "pack_file" in report:
        click.echo(f"written to {report['pack_file']}")
    if "artifact" in report:
        click.echo(f"pushed as {report['artifact']}, a referrer of {report['manifest']}")
