"""`firstbyte profile`: what starts touch, as nodes have recorded it."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click
import trio

from index import profile as profiles
from index.extents import files_in
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
from snapshotter.cli.profile_lookup import chain_id_of, find, node_profile, none_here, read_profile
from snapshotter.images.profiles import check_of, publish_profile
from snapshotter.store.profiles import ProfileStore

if TYPE_CHECKING:
    from collections.abc import Iterator

    from index.file import FileIndex
    from index.profile import Profile

_ROWS = 40  # of the table, unless all are asked for
_NAMES = 3  # files that are named in a row


@click.group()
def profile() -> None:
    """Show, export and push startup profiles: what a start of an image reads, in order.

    A node records them by itself, whenever an image starts that is not all there.
    """


@profile.command(name="ls")
@places_options
@json_option
def list_(root: Path | None, state: Path | None, as_json: bool) -> None:
    """List the profiles of this node, the latest first."""
    store = ProfileStore(places_of(root, state).root, writer=False)
    known = [(chain_id, store.get(chain_id)) for chain_id in store.chain_ids()]
    if not as_json:
        click.echo(f"{'chain':21}{'runs':>5}{'chunks':>8}{'likely':>8}  image")
    for chain_id, found in known:
        if found is None:
            continue
        if as_json:
            click.echo(json.dumps({"chain_id": chain_id} | _summary(found)))
        else:
            click.echo(
                f"{chain_id[:19]}  {found.runs:5}{len(found.touches):8}{len(found.likely):8}  "
                f"{found.name}"
            )


@profile.command()
@click.argument("what")
@click.option("--all", "everything", is_flag=True, help="Show every row.")
@places_options
@platform_option
@plain_http_option
@json_option
def show(
    what: str,
    everything: bool,
    root: Path | None,
    state: Path | None,
    platform: str | None,
    plain_http: bool,
    as_json: bool,
) -> None:
    """Show what a start reads, in order, and in which files it lies.

    WHAT is an image, a directory that one is mounted on, a manifest's digest or a chain ID that
    this node knows, or a file. If this node has no profile of an image, those that were pushed are
    shown.
    """
    found = trio.run(partial(find, what, places_of(root, state), platform, plain_http, files=True))
    shown = found.profile
    names = {} if found.index is None else _names(found.index, shown)
    if as_json:
        rows = [
            {
                "layer": touch.layer,
                "chunk": touch.chunk,
                "after_ms": touch.after,
                "seen": touch.seen,
                "files": [os.fsdecode(name) for name in names.get(touch.place, [])],
            }
            for touch in shown.touches
        ]
        click.echo(json.dumps(_summary(shown) | {"from": found.origin, "touches": rows}))
        return
    likely = len(shown.likely)
    click.echo(f"{shown.name or what}, {found.origin}: {_count(shown.runs, 'run')}")
    click.echo(
        f"{_count(len(shown.touches), 'chunk')}, {progress.mb(len(shown.touches) * CHUNK_SIZE)}; "
        f"{likely} of them ({progress.mb(likely * CHUNK_SIZE)}) likely enough to be brought"
    )
    rows_shown = list(_rows(shown))
    if rows_shown:
        click.echo(f"\n{'after':>9}{'size':>10}{'layer':>7}{'chunks':>14}{'runs':>6}  files")
    for touch, last in rows_shown if everything else rows_shown[:_ROWS]:
        held: dict[bytes, None] = {}
        for chunk in range(touch.chunk, last + 1):
            held.update(dict.fromkeys(names.get((touch.layer, chunk), [])))
        chunks = f"{touch.chunk}-{last}" if last > touch.chunk else str(touch.chunk)
        size = f"{(last - touch.chunk + 1) * CHUNK_SIZE // 1024} KiB"
        click.echo(
            f"{touch.after / 1000:8.3f}s{size:>10}{touch.layer:7}{chunks:>14}{touch.seen:6}  "
            f"{_files(list(held))}"
        )
    if not everything and len(rows_shown) > _ROWS:
        click.echo(f"… {len(rows_shown) - _ROWS} rows more: --all shows them")


@profile.command()
@click.argument("what")
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write the profile to this file [default: standard output].",
)
@places_options
@platform_option
@plain_http_option
def export(
    what: str,
    output: Path | None,
    root: Path | None,
    state: Path | None,
    platform: str | None,
    plain_http: bool,
) -> None:
    """Write a profile to a file, for `firstbyte index build --profile`.

    WHAT is as for `firstbyte profile show`.
    """
    found = trio.run(partial(find, what, places_of(root, state), platform, plain_http))
    data = profiles.encode(found.profile) + b"\n"
    if output is None:
        click.echo(data, nl=False)
    else:
        output.write_bytes(data)
        click.echo(f"{_count(len(found.profile.touches), 'chunk')} written to {output}")


@profile.command()
@click.argument("reference")
@click.option(
    "--profile",
    "profile_file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Push this file [default: what this node has recorded of the image].",
)
@places_options
@platform_option
@plain_http_option
@json_option
def push(
    reference: str,
    profile_file: Path | None,
    root: Path | None,
    state: Path | None,
    platform: str | None,
    plain_http: bool,
    as_json: bool,
) -> None:
    """Attach a profile to an image in a registry, or in an OCI layout.

    `firstbyte index build --profile-from-registry` makes a startup pack of all that were attached.
    """

    async def run() -> tuple[Profile, str, str]:
        async with connect(plain_http=plain_http) as locations:
            image = await locations.source(reference).resolve(chosen_platform(platform))
            if profile_file is not None:
                pushed = read_profile(profile_file)
            else:
                pushed = node_profile(places_of(root, state), image)
            check_of(pushed, image)
            # What the node calls the image is the node's matter.
            artifact = await publish_profile(
                locations.sink(reference), image.descriptor, replace(pushed, name="")
            )
        return pushed, artifact.digest, image.descriptor.digest

    pushed, artifact, manifest = trio.run(run)
    if as_json:
        click.echo(json.dumps(_summary(pushed) | {"artifact": artifact, "manifest": manifest}))
    else:
        click.echo(
            f"{_count(len(pushed.touches), 'chunk')} pushed as {artifact}, a referrer of {manifest}"
        )


@profile.command()
@click.argument("what")
@places_options
@platform_option
@plain_http_option
def rm(
    what: str, root: Path | None, state: Path | None, platform: str | None, plain_http: bool
) -> None:
    """Forget what this node has recorded of an image; it begins anew with the next start.

    WHAT is as for `firstbyte profile show`.
    """
    places = places_of(root, state)
    chain_id = trio.run(partial(chain_id_of, what, places, platform, plain_http))
    if not ProfileStore(places.root, writer=False).remove(chain_id):
        raise none_here(what)


# --- how it is shown ---


def _summary(found: Profile) -> dict[str, object]:
    return {
        "image": found.name,
        "runs": found.runs,
        "chunks": len(found.touches),
        "likely_chunks": len(found.likely),
        "layers": [f"sha256:{diff_id.hex()}" for diff_id in found.diff_ids],
    }


def _names(index: FileIndex, shown: Profile) -> dict[tuple[int, int], list[bytes]]:
    return files_in(index.tree, {touch.place for touch in shown.touches})


def _rows(shown: Profile) -> Iterator[tuple[profiles.Touch, int]]:
    """Touches with what directly follows them, as the first one and the last chunk."""
    begun: profiles.Touch | None = None
    last = 0
    for touch in shown.touches:
        if begun is not None and touch == begun._replace(chunk=last + 1, after=touch.after):
            last += 1
            continue
        if begun is not None:
            yield begun, last
        begun, last = touch, touch.chunk
    if begun is not None:
        yield begun, last


def _files(names: list[bytes]) -> str:
    shown = ", ".join(os.fsdecode(name) for name in names[:_NAMES])
    return shown + (f" and {len(names) - _NAMES} more" if len(names) > _NAMES else "")


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"
