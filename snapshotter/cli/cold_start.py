"""`firstbyte bench cold-start`, and the commands around it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from snapshotter.bench import tables
from snapshotter.bench.coldstart import catalogue, report, results
from snapshotter.bench.coldstart import concurrent as concurrency
from snapshotter.bench.coldstart import fill as filling
from snapshotter.bench.coldstart import update as updating
from snapshotter.bench.coldstart.modes import DEFAULT, OVERLAYFS, STANDARD, UNMODIFIED, Mode
from snapshotter.bench.coldstart.run import Plan, run
from snapshotter.bench.coldstart.session import open_session
from snapshotter.bench.conditions import Conditions
from snapshotter.bench.link import profiles
from snapshotter.bench.link.profiles import LinkProfile
from snapshotter.bench.recipes.build import DEFAULT_CACHE, Builder
from snapshotter.cli.benching import (
    bench_workspace,
    output_options,
    samples_option,
    say,
    show,
)
from snapshotter.cli.connection import json_option

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from snapshotter.bench.coldstart.catalogue import Image
    from snapshotter.bench.coldstart.results import Results
    from snapshotter.bench.coldstart.session import Session
    from snapshotter.bench.tables import Table

_ALL_LINKS = "standard"
_DEFAULT_IMAGES = ("service",)
_DEFAULT_LINK = "200mbit-20ms"
_DEFAULT_MODES = tuple(mode.name for mode in DEFAULT)

_list_option = click.option(
    "--images",
    "listed",
    metavar="LIST",
    default=catalogue.BUILT,
    show_default=True,
    help="Which list of images: `built` from Debian and PyPI packages, `public` ones, or a TOML "
    "file of your own.",
)
_image_option = click.option(
    "--image",
    "names",
    metavar="NAME",
    multiple=True,
    help="An image of the list, or a group of them; may be given several times [default: service].",
)
_cache_option = click.option(
    "--cache",
    metavar="DIR",
    type=click.Path(file_okay=False, path_type=Path),
    default=DEFAULT_CACHE,
    show_default=True,
    help="Where built images are kept.",
)
_registry_option = click.option(
    "--registry",
    "kept",
    metavar="DIR",
    type=click.Path(file_okay=False, path_type=Path),
    help="Keep the registry there, with the images and what was made of them, for later runs of "
    "the same version of FirstByte.",
)
_modes_option = click.option(
    "--mode",
    "modes",
    metavar="MODE",
    multiple=True,
    default=_DEFAULT_MODES,
    show_default=True,
    help=f"How to start: {', '.join(mode.name for mode in STANDARD)}; or another snapshotter as "
    "NAME@SOCKET of the containerd whose CRI uses it.",
)


@click.command("cold-start")
@_list_option
@_image_option
@_modes_option
@click.option(
    "--link",
    "links",
    metavar="LINK",
    multiple=True,
    default=(_DEFAULT_LINK,),
    show_default=True,
    help="A network link, as 200mbit-20ms or 20mbit-150ms-1%; `standard` is all of "
    f"{', '.join(link.name for link in profiles.STANDARD)}.",
)
@samples_option(5)
@click.option(
    "--budget",
    metavar="MINUTES",
    type=click.FloatRange(min=0, min_open=True),
    help="End in about this time, whatever is missing then.",
)
@click.option(
    "--resume",
    metavar="FILE",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Keep results in this file, and only measure what is missing in it.",
)
@click.option(
    "--report",
    "target",
    metavar="DIR",
    type=click.Path(file_okay=False, path_type=Path),
    help="Write a report there: Markdown, pictures, and one HTML page with all of it.",
)
@click.option(
    "--no-local",
    "wait_local",
    is_flag=True,
    flag_value=False,
    default=True,
    help="Do not wait until all of an image has come.",
)
@_cache_option
@_registry_option
@json_option
def cold_start(
    listed: str,
    names: tuple[str, ...],
    modes: tuple[str, ...],
    links: tuple[str, ...],
    samples: int,
    budget: float | None,
    resume: Path | None,
    target: Path | None,
    wait_local: bool,
    cache: Path,
    kept: Path | None,
    as_json: bool,
) -> None:
    """From "run this image" on an empty node to "the workload answers".

    Each sample is a new node: nothing in its stores, the page cache dropped, no connection open.
    A real registry is behind a link of known bandwidth and delay. Images are built when they are
    needed for the first time, which takes minutes each.
    """
    plan = Plan(
        images=_chosen(listed, names),
        modes=[Mode.parse(mode) for mode in modes],
        links=_links(links),
        samples=samples,
        wait_local=wait_local,
        cache=cache,
        kept=kept,
        output=resume,
        budget=None if budget is None else 60 * budget,
        results=results.read(resume) if resume and resume.exists() else results.Results(),
    )
    with bench_workspace() as workspace:
        found = run(workspace, plan, say)
    if target:
        _write_report(found, target)
    if as_json:
        click.echo(msgspec.json.encode(found))
    else:
        click.echo(tables.as_text(report.tables(found)))


def _table_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """What the smaller benchmarks take. Each prints one table, with the conditions."""
    for option in (
        output_options(3),
        _cache_option,
        click.option(
            "--link",
            "link_name",
            metavar="LINK",
            default=_DEFAULT_LINK,
            show_default=True,
            help="The network link.",
        ),
        click.option(
            "--mode",
            "modes",
            metavar="MODE",
            multiple=True,
            default=(OVERLAYFS.name, UNMODIFIED.name),
            show_default=True,
            help="How to start, as for cold-start.",
        ),
        _list_option,
    ):
        command = option(command)
    return command


@click.command()
@click.option("--image", "name", metavar="NAME", default="python-web", show_default=True)
@click.option(
    "--starts",
    "counts",
    metavar="N",
    type=click.IntRange(min=1),
    multiple=True,
    default=(1, 10, 50),
    show_default=True,
    help="How many at once; may be given several times.",
)
@_table_options
def concurrent(name: str, counts: tuple[int, ...], **options: Any) -> None:
    """Many starts of one image at once: what is fetched more than once, and what it takes."""
    (image,) = _chosen(options["listed"], [name])

    def measure(session: Session, modes: list[Mode], samples: int) -> Table:
        return concurrency.concurrent(session, image, modes, sorted(set(counts)), samples)

    _print_table(measure, options)


@click.command()
@click.option("--old", metavar="NAME", default="update-old", show_default=True)
@click.option("--new", metavar="NAME", default="update-new", show_default=True)
@_table_options
def update(old: str, new: str, **options: Any) -> None:
    """Starting a new version of an image where the old one is present."""
    (before,), (after,) = (_chosen(options["listed"], [name]) for name in (old, new))

    def measure(session: Session, modes: list[Mode], samples: int) -> Table:
        return updating.update(session, before, after, modes, samples)

    _print_table(measure, options)


@click.command()
@click.option(
    "--image", "names", metavar="NAME", multiple=True, default=("postgres",), show_default=True
)
@_table_options
def fill(names: tuple[str, ...], **options: Any) -> None:
    """How fast an image arrives in the background when nobody waits for it."""
    images = _chosen(options["listed"], names)

    def measure(session: Session, modes: list[Mode], samples: int) -> Table:
        return filling.fill(session, images, modes, samples)

    _print_table(measure, options)


@click.command("build")
@_list_option
@_image_option
@_modes_option
@_cache_option
@_registry_option
def build(
    listed: str, names: tuple[str, ...], modes: tuple[str, ...], cache: Path, kept: Path | None
) -> None:
    """Build images ahead, so that a measurement need not wait for them.

    With --registry they are also put into it, with what the modes need.
    """
    images, chosen = _chosen(listed, names), [Mode.parse(mode) for mode in modes]
    with bench_workspace() as workspace:
        if kept:
            link = LinkProfile.parse(_DEFAULT_LINK)
            with open_session(workspace, link, cache, say, kept) as session:
                for image in images:
                    for mode in chosen:
                        session.publisher.repository(image, mode.variant)
            return
        builder = Builder(workspace, cache, say)
        for image in images:
            if image.recipe:
                say(f"{image.name}: {builder.image(image.name, image.recipe)}")


@click.command("report")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("directory", type=click.Path(file_okay=False, path_type=Path))
def make_report(file: Path, directory: Path) -> None:
    """Make a report of the results in FILE: Markdown, pictures, and one HTML page."""
    _write_report(results.read(file), directory)


COMMANDS = (cold_start, concurrent, update, fill, build, make_report)


def _print_table(
    measure: Callable[[Session, list[Mode], int], Table], options: Mapping[str, Any]
) -> None:
    link, modes = LinkProfile.parse(options["link_name"]), map(Mode.parse, options["modes"])
    with bench_workspace() as workspace:
        conditions = Conditions(workspace.path)
        with open_session(workspace, link, options["cache"], say) as session:
            table = measure(session, list(modes), options["samples"])
        show([conditions.table(), table], options["as_json"], options["as_markdown"])


def _chosen(listed: str, names: Sequence[str]) -> list[Image]:
    if listed in (catalogue.BUILT, catalogue.PUBLIC):
        return catalogue.choose(catalogue.builtin(listed), names or _DEFAULT_IMAGES)
    return catalogue.choose(catalogue.load(Path(listed)), names)


def _links(names: Sequence[str]) -> list[LinkProfile]:
    found: dict[LinkProfile, None] = {}
    for name in names:
        if name == _ALL_LINKS:
            found |= dict.fromkeys(profiles.STANDARD)
        else:
            found[LinkProfile.parse(name)] = None
    return list(found)


def _write_report(found: Results, directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "report.md").write_text(report.markdown(found))
    (directory / "report.html").write_text(report.page(found))
    for name, picture in report.pictures(found).items():
        (directory / f"{name}.svg").write_text(picture)
    say(f"the report is at {directory / 'report.html'}")
