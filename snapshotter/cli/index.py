"""`firstbyte index`: build file indexes, look into them, check them."""

from __future__ import annotations

import json
import os
import stat
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import click
import trio

from index.erofs.validate import validate
from index.errors import IntegrityError, about
from index.file import FileIndex
from index.resolver import resolve
from snapshotter.cli import progress
from snapshotter.cli.connection import (
    chosen_platform,
    connect,
    json_option,
    registry_options,
)
from snapshotter.cli.index_build import SUFFIX, build, describe
from snapshotter.images import artifact
from snapshotter.images.discovery import find_index
from snapshotter.images.indexing import build_index
from snapshotter.registry.errors import NotFoundError

if TYPE_CHECKING:
    from index.erofs.reader import Inode
    from snapshotter.registry.image import ImageSource, ResolvedImage
    from snapshotter.registry.manifest import Descriptor


@click.group()
def index() -> None:
    """Build, show, list and verify file indexes."""


index.add_command(build)


@index.command()
@click.argument("index_or_image", metavar="INDEX")
@registry_options
@json_option
def show(index_or_image: str, platform: str | None, plain_http: bool, as_json: bool) -> None:
    """Show what an index holds: a file, or the index of an image in a registry."""
    found = trio.run(_open, index_or_image, platform, plain_http)
    opened, pack = found.index, found.pack
    described = describe(opened)
    if pack is not None:
        described["startup_pack"] = {"digest": pack.digest, "size": pack.size}
    if as_json:
        click.echo(json.dumps(described, indent=2))
        return
    click.echo(f"index  {described['digest']}")
    click.echo(f"inodes {described['inodes']}")
    if pack is not None:
        click.echo(f"with a startup pack of {progress.mb(pack.size)}, {pack.digest}")
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

    With --rebuild the image's layers are read too, and the index built from them must be the same,
    but for seek points that another version chose.
    """
    opened = trio.run(_verify, index_or_image, image_name, rebuild, platform, plain_http, as_json)
    digest = f"sha256:{opened.digest.hex()}"
    if as_json:
        click.echo(json.dumps({"digest": digest, "valid": True, "rebuilt": rebuild}))
    else:
        click.echo(
            f"index {digest} is valid"
            + (", and so is what it says of the image" if rebuild else "")
        )


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
        if rebuilt.describes_the_same(opened):
            message = f"another version chose the seek points of sha256:{opened.digest.hex()}"
            click.echo(f"{message}; all else is rebuilt the same", err=True)
            return
        raise IntegrityError(
            f"the index sha256:{opened.digest.hex()} is not what {image.name} gives, which is "
            f"sha256:{rebuilt.digest.hex()}",
            hint="do not use it; build and push it again",
        )


@dataclass(frozen=True, slots=True)
class _Opened:
    index: FileIndex
    image_name: str | None  # where it was found, unless it is a file
    pack: Descriptor | None = None


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
    return _Opened(found.index, text, found.pack)
