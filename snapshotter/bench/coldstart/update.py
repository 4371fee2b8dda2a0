"""Starting a new version of an image on a node that has the old one."""

from __future__ import annotations

import statistics
from functools import partial
from typing import TYPE_CHECKING

import msgspec

from snapshotter.bench.coldstart.measure import measure
from snapshotter.bench.tables import Cell, Table
from snapshotter.bench.timing import interleaved

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from snapshotter.bench.coldstart.catalogue import Image
    from snapshotter.bench.coldstart.modes import Mode
    from snapshotter.bench.coldstart.results import Sample
    from snapshotter.bench.coldstart.session import Session


def update(session: Session, old: Image, new: Image, modes: Sequence[Mode], samples: int) -> Table:
    """Start `new` on an empty node, and on one that has all of `old`. BenchError or DemoError."""

    def start(mode: Mode, present: Image | None) -> Sample:
        with session.node(mode) as node:
            if present:
                session.provide(node, present, mode)
            sample = measure(session.place, node, session.start(new, mode))[0]
        what = f"with {present.name} present" if present else "on an empty node"
        session.say(f"{new.name}, {mode.name}, {what}: ready after {sample.ready:.2f} s")
        return sample

    works: dict[tuple[str, str], Callable[[], Sample]] = {}
    for mode in modes:
        for image in (old, new):
            session.publisher.repository(image, mode.variant)
        works[mode.name, "nothing"] = partial(start, mode, None)
        works[mode.name, old.name] = partial(start, mode, old)
    rows: list[tuple[Cell, ...]] = []
    kept: list[Mapping[str, object]] = []
    for (mode_name, present_name), found in interleaved(samples, works).items():
        kept += [{"present": present_name, **msgspec.structs.asdict(sample)} for sample in found]
        rows.append(
            (
                mode_name,
                present_name,
                statistics.median(sample.ready for sample in found),
                statistics.median(sample.ready_bytes for sample in found) / 1e6,
                statistics.median(sample.local or 0.0 for sample in found),
                statistics.median(sample.total_bytes for sample in found) / 1e6,
            )
        )
    return Table(
        f"Starting {new.name}, {session.place.registry.link.profile.name}",
        ("mode", "present", "ready s", "MB until ready", "local after s", "MB in all"),
        tuple(rows),
        f"Medians of {samples} rounds.",
        tuple(kept),
    )
