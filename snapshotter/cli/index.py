"""`firstbyte index`: build file indexes, look into them, check them."""

from __future__ import annotations

import json
import os
import stat
import tempfile
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click
import trio

from index.erofs.validate import validate
from index.errors import IntegrityError, about
from index.file import FileIndex
from index.resolve import resolve
from snapshotter.cli import progress
from snapshotter.cli.connection import (
    chosen_platform,
    connect,
    json_option,
    plain_http_option,
    platform_option,
    registry_options,
)
from snapshotter.cli.mount import places_of, places_options
from snapshotter.cli.profile_lookup import node_profile, pushed_profile, read_profile
from snapshotter.images import artifact
from snapshotter.images.discovery import find_index
from snapshotter.images.indexing import build_index
from snapshotter.images.packing import ChunkCollector, build_pack
from snapshotter.images.profiles import check_of
from snapshotter.registry.errors import NotFoundError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from index.erofs.reader import Inode
    from index.profile import Profile
    from snapshotter.registry.image import ImageSource, ResolvedImage

SUFFIX = ".fbx"
"""Of files that hold an index."""

PACK_SUFFIX = ".fbp"
"""Of files that hold a startup pack."""


@click.group()
def index() -> None:
    """Build, show, list and verify file indexes."""


@index.command()
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
        pack = await trio.to_thread.run_sync(build_pack, built, collected) if collected else None
        report = _describe(built) | {
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


def _describe(opened: FileIndex) -> dict[str, object]:
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


@index.command()
@click.argument("index_or_image", metavar="INDEX")
@registry_options
@json_option
def show(index_or_image: str, platform: str | None, plain_http: bool, as_json: bool) -> None:
    """Show what an index holds: a file, or the index of an image in a registry."""
    opened = trio.run(_open, index_or_image, platform, plain_http).index
    described = _describe(opened)
    if as_json:
        click.echo(json.dumps(described, indent=2))
        return
    click.echo(f"index  {described['digest']}")
    click.echo(f"inodes {described['inodes']}")
    click.echo(f"\n{'section':10}{'expanded':>14}")
    for name, size in opened.section_sizes.items():
        click.echo(f"{name:10}{size:14,}")
    click.echo(f"\n{'layer':21}{'codec':6}{'blob':>14}{'raw':>14}{'chunks':>8}{'points':>8}")
    for table in opened.layers:
        click.echo(
            f"sha256:{table.digest.hex()[:12]}  {table.codec.name.lower():6}{table.blob_size:14,}"
            f"{table.raw_size:14,}{table.chunk_count:8}{len(table.raw_offsets):8}"
        )


@index.command()
@click.option("-l", "long", is_flag=True, help="Show modes, owners, sizes and times.")
@click.argument("index_or_image", metavar="INDEX")
@click.argument("path", default="/")
@registry_options
@json_option
def ls(
    long: bool,
    index_or_image: str,
    path: str,
    platform: str | None,
    plain_http: bool,
    as_json: bool,
) -> None:
    """List a file or directory of an image, without any of its layers."""
    tree = trio.run(_open, index_or_image, platform, plain_http).index.tree
    wanted = os.fsencode(path)
    nid = resolve(tree, wanted)
    if nid is None:
        raise NotFoundError(f"{path}: no such file or directory in {index_or_image}")
    if stat.S_ISDIR(tree.inode(nid).mode):
        rows = [(name, number) for _, name, number, _ in tree.readdir(nid)]
    else:
        rows = [(wanted, nid)]
    for name, number in rows:
        inode = tree.inode(number)
        target = tree.readlink(number) if stat.S_ISLNK(inode.mode) else None
        if as_json:
            row = {
                "name": os.fsdecode(name),
                "mode": inode.mode,
                "links": inode.nlink,
                "uid": inode.uid,
                "gid": inode.gid,
                "size": inode.size,
                "mtime_ns": inode.mtime_ns,
                "target": None if target is None else os.fsdecode(target),
            }
            click.echo(json.dumps(row))
            continue
        line = name
        if long:
            line = _long(inode).encode() + name
            if target is not None:
                line += b" -> " + target
        click.echo(line)


def _long(inode: Inode) -> str:
    """The columns of `ls -l` before the name; times in UTC."""
    is_device = stat.S_ISCHR(inode.mode) or stat.S_ISBLK(inode.mode)
    size = "{}, {}".format(*inode.rdev) if is_device else str(inode.size)
    try:
        when = f"{datetime.fromtimestamp(inode.mtime_ns // 10**9, UTC):%Y-%m-%d %H:%M}"
    except (ValueError, OverflowError):  # before the year 1 or after 9999
        when = f"@{inode.mtime_ns // 10**9}"
    return (
        f"{stat.filemode(inode.mode)} {inode.nlink:3} {inode.uid:5} {inode.gid:5} "
        f"{size:>12} {when} "
    )


@index.command()
@click.argument("index_or_image", metavar="INDEX")
@click.option("--image", "image_name", metavar="REF", help="The image it must be the index of.")
@click.option("--rebuild", is_flag=True, help="Read the image's layers and build it again.")
@registry_options
@json_option
def verify(
    index_or_image: str,
    image_name: str | None,
    rebuild: bool,
    platform: str | None,
    plain_http: bool,
    as_json: bool,
) -> None:
    """Check an index: every digest, the whole tree, and that it is of its image.

    With --rebuild the image's layers are read too, and the index built from them must be the same.
    """
    opened = trio.run(_verify, index_or_image, image_name, rebuild, platform, plain_http, as_json)
    digest = f"sha256:{opened.digest.hex()}"
    if as_json:
        click.echo(json.dumps({"digest": digest, "valid": True, "rebuilt": rebuild}))
    else:
        click.echo(f"index {digest} is valid" + (", and rebuilt the same" if rebuild else ""))


async def _verify(
    index_or_image: str,
    image_name: str | None,
    rebuild: bool,
    platform: str | None,
    plain_http: bool,
    as_json: bool,
) -> FileIndex:
    opened = await _open(index_or_image, platform, plain_http)
    await trio.to_thread.run_sync(
        validate, opened.index.tree, [table.raw_size for table in opened.index.layers]
    )
    name = image_name or opened.image_name
    if name is None:
        if rebuild:
            raise NotFoundError("which image to rebuild the index from?", hint="give --image REF")
        return opened.index
    async with connect(plain_http=plain_http) as locations:
        source = locations.source(name)
        image = await source.resolve(chosen_platform(platform))
        artifact.check_belongs(opened.index, image)
        if rebuild:
            await _compare_with_rebuilt(source, image, opened.index, as_json)
    return opened.index


async def _compare_with_rebuilt(
    source: ImageSource, image: ResolvedImage, opened: FileIndex, as_json: bool
) -> None:
    with progress.show(quiet=as_json) as shown:
        size = sum(layer.size for layer in image.manifest.layers)
        task = shown.task(f"reading {image.name}", size)
        rebuilt = await build_index(source, image, on_progress=task.update)
    if rebuilt.digest != opened.digest:
        raise IntegrityError(
            f"the index sha256:{opened.digest.hex()} is not what {image.name} gives, which is "
            f"sha256:{rebuilt.digest.hex()}",
            hint="do not use it; build and push it again",
        )


@dataclass(frozen=True, slots=True)
class _Opened:
    index: FileIndex
    image_name: str | None  # where it was found, unless it is a file


async def _open(text: str, platform: str | None, plain_http: bool) -> _Opened:
    """A file if there is one of that name, else the index of that image."""
    path = trio.Path(text)
    if await path.is_file():
        data = await path.read_bytes()
        with about(text):
            return _Opened(await trio.to_thread.run_sync(FileIndex.load, data), None)
    if text.startswith(("/", "./", "../")) or text.endswith(SUFFIX):  # no image has such a name
        raise NotFoundError(f"{text}: no such file")
    async with connect(plain_http=plain_http) as locations:
        source = locations.source(text)
        image = await source.resolve(chosen_platform(platform))
        found = await find_index(source, image)
    if found is None:
        raise NotFoundError(
            f"{image.name} has no file index",
            hint=f"make one: firstbyte index build --push {text}",
        )
    return _Opened(found.index, text)
