"""Results of cold starts for people: tables, pictures, and one page that has all of it."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from snapshotter.bench import charts
from snapshotter.bench.coldstart.figures import Figures
from snapshotter.bench.coldstart.modes import NO_FILL, STANDARD
from snapshotter.bench.tables import Cell, Table, as_markdown, show

if TYPE_CHECKING:
    from collections.abc import Iterator

    from snapshotter.bench.coldstart.figures import Kind
    from snapshotter.bench.coldstart.results import Results

_PHASES = ("pull", "create", "start the program", "until it answers")
_MISSING = "–"
_MB = 1e6
_MIN_STALL = 1e-6  # seconds: what a logarithmic axis begins with

_STYLE = """
body { font: 15px/1.5 system-ui, Helvetica, Arial, sans-serif; color: #222; max-width: 70rem;
       margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; margin: 1rem 0; font-size: 13px }
th, td { padding: .2rem .6rem; border-bottom: 1px solid #ddd; text-align: right }
td { white-space: nowrap }
th { border-bottom: 2px solid #999 }
th.text, td.text { text-align: left }
p.note { color: #555; font-size: 13px }
svg { max-width: 100%; height: auto; margin: .5rem 0 }
"""


def tables(results: Results) -> list[Table]:
    """Conditions, targets, times and costs."""
    figures = Figures(results)
    made = [_conditions(results), _targets(figures), _images(results)]
    for link in figures.links:
        kinds = [kind for kind in figures.kinds if kind.link == link]
        made += [_times(figures, link, kinds), _costs(figures, link, kinds), _reads(link, kinds)]
    if local := [kind for kind in figures.kinds if not kind.link]:
        made.append(_local(local))
    return [table for table in made if table.rows]


def markdown(results: Results) -> str:
    """For docs/benchmarks/."""
    return f"# Cold starts\n\n{as_markdown(tables(results))}\n"


def pictures(results: Results) -> dict[str, str]:
    """SVG documents by name: timelines, bytes over time, stalls."""
    figures = Figures(results)
    made: dict[str, str] = {}
    for link in figures.links:
        made[f"timeline-{link}"] = _timeline(figures, link)
        for image in results.images:
            kinds = [k for k in figures.kinds if (k.image, k.link) == (image, link)]
            curves = [kind for kind in kinds if kind.typical.curve]
            if curves:
                made[f"bytes-{image}-{link}"] = _curves(image, link, curves)
            stalling = [kind for kind in kinds if kind.stalls]
            if stalling:
                local = [k for k in figures.kinds if k.image == image and not k.link]
                made[f"stalls-{image}-{link}"] = _stalls(image, link, [*stalling, *local])
    return made


def page(results: Results) -> str:
    """One HTML document that needs nothing else."""
    body = [f"<h1>Cold starts</h1>{_html(table)}" for table in tables(results)[:1]]
    body += [_html(table) for table in tables(results)[1:3]]
    body += pictures(results).values()
    body += [_html(table) for table in tables(results)[3:]]
    return (
        "<!doctype html><html lang='en'><meta charset='utf-8'><title>Cold starts</title>"
        f"<meta name='viewport' content='width=device-width'><style>{_STYLE}</style>"
        f"{''.join(body)}</html>\n"
    )


def _conditions(results: Results) -> Table:
    """A column for each run would be too wide: what is the same in all of them is said once."""
    rows: list[tuple[Cell, ...]] = []
    for what in dict.fromkeys(key for run in results.conditions for key in run):
        values = dict.fromkeys(run[what] for run in results.conditions if what in run)
        rows.append((what, "; ".join(values)))
    return Table("Conditions", ("what", "value"), tuple(rows))


def _targets(figures: Figures) -> Table:
    words = {True: "met", False: "missed", None: _MISSING}
    rows: list[tuple[Cell, ...]] = []
    for target in figures.targets():
        goal = _MISSING
        if target.at_least is not None:
            goal = f">= {target.at_least:g}"
        elif target.at_most is not None:
            goal = f"<= {target.at_most:g}"
        has_goal = goal != _MISSING
        rows.append(
            (target.name, goal, _or_missing(target.value), words[target.met if has_goal else None])
        )
    return Table("Targets", ("what", "target", "measured", ""), tuple(rows))


def _images(results: Results) -> Table:
    rows: list[tuple[Cell, ...]] = []
    for name, facts in results.images.items():
        read: tuple[Cell, ...] = (_MISSING,) * 4
        if found := facts.touched:
            share = 100 * found.compressed_bytes / facts.compressed_bytes
            read = (found.files, found.bytes / _MB, found.compressed_bytes / _MB, share)
        rows.append((name, facts.layers, facts.compressed_bytes / _MB, *read))
    return Table(
        "Images",
        ("image", "layers", "MB", "files read", "MB read", "MB read, compressed", "% read"),
        tuple(rows),
        "What a start from the local disk reads of an image: what of its files is in the page "
        "cache when the workload is ready, with what the kernel has read ahead.",
    )


def _times(figures: Figures, link: str, kinds: list[Kind]) -> Table:
    rows: list[tuple[Cell, ...]] = []
    for kind in kinds:
        phases = kind.phases
        rows.append(
            (
                kind.image,
                kind.mode,
                len(kind.samples),
                phases.pull,
                phases.create,
                phases.start,
                phases.answer,
                kind.ready,
                kind.ready_p95,
                _or_missing(kind.limit),
                _or_missing(kind.to_limit),
                _or_missing(figures.speedup(kind)),
                _or_missing(kind.median("work")),
                _or_missing(kind.median("local")),
            )
        )
    for mode in STANDARD:
        images = [kind.image for kind in kinds if kind.mode == mode.name]
        if images:
            mean = figures.mean_to_limit(mode.name, [link])
            speedup = figures.mean_speedup(mode.name, [link], images)
            blank = [_MISSING] * 6
            means = (_or_missing(mean), _or_missing(speedup))
            rows.append(
                ("geometric mean", mode.name, len(images), *blank, _MISSING, *means, *blank[:2])
            )
    return Table(
        f"Time until ready, {link}",
        (
            "image",
            "mode",
            "n",
            "pull s",
            "create s",
            "start s",
            "answer s",
            "ready s",
            "p95 s",
            "limit s",
            "/ limit",
            "normal / it",
            "work s",
            "local after s",
        ),
        tuple(rows),
        "Medians. The limit is a start from the local disk with a dropped page cache, plus what it "
        "reads, compressed, over the bandwidth, plus two round trips. `normal / it` is how many "
        "times as long a normal pull and start by the same runner takes.",
    )


def _costs(figures: Figures, link: str, kinds: list[Kind]) -> Table:
    rows: list[tuple[Cell, ...]] = []
    for kind in kinds:
        needed = kind.median("needed_bytes")
        read, pack = kind.needed_bytes, figures.results.images[kind.image].profile_bytes
        rows.append(
            (
                kind.image,
                kind.mode,
                (kind.median("ready_bytes") or 0) / _MB,
                _or_missing(kind.median("ready_requests")),
                _or_missing(kind.median("connections")),
                _or_missing(_in_mb(needed)),
                _or_missing(needed and read and needed / read),
                _or_missing(needed and pack and needed / pack),
                (kind.median("total_bytes") or 0) / _MB,
                _or_missing(kind.median("total_requests")),
                _or_missing(kind.median("fuse_requests")),
                _or_missing(kind.median("daemon_cpu_seconds")),
                _or_missing(_in_mb(kind.median("daemon_peak_bytes"))),
                _or_missing(_in_mb(kind.median("disk_bytes"))),
            )
        )
    return Table(
        f"What it costs, {link}",
        (
            "image",
            "mode",
            "MB until ready",
            "requests",
            "connections",
            "of it needed MB",
            "needed / read",
            "needed / profile",
            "MB in all",
            "requests in all",
            "FUSE requests",
            "daemon CPU s",
            "daemon peak MB",
            "disk MB",
        ),
        tuple(rows),
        "Medians, counted on the link. Needed is what FirstByte fetched because somebody waited, "
        "or was about to; the rest until ready is background fill. `needed / read` compares that "
        "with what a local start reads, compressed, `needed / profile` with the startup pack's "
        "size. The daemon is FirstByte's, or else containerd; podman has none.",
    )


def _reads(link: str, kinds: list[Kind]) -> Table:
    rows: list[tuple[Cell, ...]] = []
    for kind in kinds:
        if stalls := kind.stalls:
            times = (1e3 * kind.stall(share) for share in (0.5, 0.95, 0.99))
            rows.append((kind.image, kind.mode, len(stalls), *times, 1e3 * stalls[-1]))
    return Table(
        f"Single reads of the workload, {link}",
        ("image", "mode", "reads", "median ms", "p95 ms", "p99 ms", "longest ms"),
        tuple(rows),
        f"Of all samples together, of workloads that tell how long each took. `{NO_FILL.name}` "
        "downloads nothing that is not read.",
    )


def _local(kinds: list[Kind]) -> Table:
    rows: list[tuple[Cell, ...]] = []
    for kind in kinds:
        took = kind.phases
        rows.append(
            (
                kind.image,
                kind.mode,
                len(kind.samples),
                took.create,
                took.start,
                took.answer,
                kind.ready,
                kind.ready_p95,
                _or_missing(kind.median("work")),
            )
        )
    columns = (
        "image",
        "mode",
        "n",
        "create s",
        "start s",
        "answer s",
        "ready s",
        "p95 s",
        "work s",
    )
    return Table(
        "Starts of images that are on the node", columns, tuple(rows), "Page cache dropped before."
    )


def _timeline(figures: Figures, link: str) -> str:
    groups = []
    for image in figures.results.images:
        bars = []
        for kind in figures.kinds:
            if kind.image == image and kind.link in (link, ""):
                phases = kind.phases
                values = (phases.pull, phases.create, phases.start, phases.answer)
                bars.append(charts.Bar(kind.mode, values, kind.limit))
        if any(kind.image == image and kind.link == link for kind in figures.kinds):
            groups.append(charts.Group(image, tuple(bars)))
    return charts.stacked_bars(
        f"From “run” to “ready”, {link}", groups, _PHASES, "s", "physical limit"
    )


def _curves(image: str, link: str, kinds: list[Kind]) -> str:
    drawn = []
    for kind in kinds:
        sample = kind.typical
        points = [(seconds, count / _MB) for seconds, count in sample.curve]
        points.append((max(sample.ready, points[-1][0]), points[-1][1]))
        drawn.append(charts.Line(kind.mode, tuple(points), sample.ready))
    title = f"Bytes over the link: {image}, {link} (dots: ready)"
    return charts.lines(title, drawn, "seconds", "MB")


def _stalls(image: str, link: str, kinds: list[Kind]) -> str:
    drawn = []
    for kind in kinds:
        values = kind.stalls
        points = tuple(
            (1e3 * max(value, _MIN_STALL), 100 * (number + 1) / len(values))
            for number, value in enumerate(values)
        )
        if points:
            drawn.append(charts.Line(kind.mode, points))
    title = f"How long single reads take: {image}, {link}"
    return charts.lines(title, drawn, "milliseconds", "% of reads", logarithmic=True, percent=True)


def _or_missing(value: float | None) -> Cell:
    return _MISSING if value is None else value


def _in_mb(count: float | None) -> float | None:
    return None if count is None else count / _MB


def _html(table: Table) -> str:
    def row(cells: Iterator[str], tag: str) -> str:
        made = (
            f"<{tag}{'' if is_number else ' class=text'}>{escape(cell)}</{tag}>"
            for cell, is_number in zip(cells, numbers, strict=True)
        )
        return f"<tr>{''.join(made)}</tr>"

    numbers = [
        any(not isinstance(line[column], str) for line in table.rows)
        for column in range(len(table.columns))
    ]
    rows = [row(iter(table.columns), "th"), *(row(map(show, line), "td") for line in table.rows)]
    note = f"<p class=note>{escape(table.note)}</p>" if table.note else ""
    return f"<h2>{escape(table.title)}</h2><table>{''.join(rows)}</table>{note}"
