"""Measures cold starts: what is asked for, in random order, until there are enough samples."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec

from snapshotter.bench.coldstart import results
from snapshotter.bench.coldstart.measure import measure
from snapshotter.bench.coldstart.publishing import PROFILED
from snapshotter.bench.coldstart.residency import touched
from snapshotter.bench.coldstart.session import open_session
from snapshotter.bench.conditions import Conditions

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from snapshotter.bench.coldstart.catalogue import Image
    from snapshotter.bench.coldstart.modes import Mode
    from snapshotter.bench.coldstart.nodes import Node
    from snapshotter.bench.coldstart.results import Results, Sample
    from snapshotter.bench.coldstart.session import Session
    from snapshotter.bench.link.profiles import LinkProfile
    from snapshotter.demo.workspace import Workspace

_NO_LINK = ""  # of starts that fetch nothing
_GUESSED_SECONDS = 20.0  # for a start of a kind that was not measured yet


@dataclass(frozen=True)
class Plan:
    """What to measure: `samples` of each image in each mode over each link.

    Samples that `results` has already count. After `budget` seconds no start is begun that would
    probably not end in time; None: all are made. `output` is written after each sample. `cache`
    and `kept` are those of `open_session`.
    """

    images: Sequence[Image]
    modes: Sequence[Mode]
    links: Sequence[LinkProfile]
    samples: int
    wait_local: bool
    cache: Path
    kept: Path | None = None
    output: Path | None = None
    budget: float | None = None
    results: Results = field(default_factory=results.Results)


@dataclass(frozen=True)
class _Step:
    image: Image
    mode: Mode
    link: LinkProfile | None
    count: int = 1


def run(workspace: Workspace, plan: Plan, say: Callable[[str], None]) -> Results:
    """Measure, and return all results. Raises BenchError, DemoError or InterruptedBySignal; what
    was measured until then is in `plan.results`, and in `plan.output`."""
    steps = _steps(plan)
    if not steps:
        return plan.results
    conditions = Conditions(workspace.path)
    with open_session(workspace, plan.links[0], plan.cache, say, plan.kept) as session:
        runner = _Runner(session, plan)
        try:
            runner.run(steps)
        finally:
            known = {str(what): str(value) for what, value in conditions.table().rows}
            plan.results.conditions.append(known)
            runner.keep()
    return plan.results


def _steps(plan: Plan) -> list[_Step]:
    """Round by round, so that whenever it ends, all kinds have about as many samples; the order in
    a round is random. Starts that fetch nothing are made in one go for each image."""
    rng, made = random.Random(), plan.results  # noqa: S311  (an order)
    rounds: list[list[_Step]] = [[] for _ in range(plan.samples)]
    for image in plan.images:
        for mode in plan.modes:
            if mode.local:
                missing = plan.samples - made.count(image.name, mode.name, _NO_LINK)
                if missing > 0:
                    rounds[0].append(_Step(image, mode, None, missing))
                continue
            for link in plan.links:
                for number in range(made.count(image.name, mode.name, link.name), plan.samples):
                    rounds[number].append(_Step(image, mode, link))
    for steps in rounds:
        rng.shuffle(steps)
    return [step for steps in rounds for step in steps]


class _Runner:
    def __init__(self, session: Session, plan: Plan) -> None:
        self._session = session
        self._plan = plan
        self._seconds: dict[tuple[str, str, str], float] = {}  # that a step took, the last time

    def run(self, steps: Sequence[_Step]) -> None:
        for step in steps:
            self._session.publisher.repository(step.image, step.mode.variant)
            self._note_facts(step)
        began, done, count = time.monotonic(), 0, sum(step.count for step in steps)
        for step in steps:
            kind = step.image.name, step.mode.name, step.link.name if step.link else _NO_LINK
            expected = self._seconds.get(kind, max([*self._seconds.values(), _GUESSED_SECONDS]))
            spent = time.monotonic() - began
            if self._plan.budget is not None and spent + expected > self._plan.budget:
                self._session.say(f"the time is used up: {count - done} samples are left")
                return
            for sample in self._local(step) if step.mode.local else self._cold(step):
                done += 1
                self._plan.results.samples.append(sample)
                self.keep()
                self._session.say(f"[{done}/{count}] {_described(sample)}")
            self._seconds[kind] = time.monotonic() - began - spent

    def keep(self) -> None:
        """Write what there is."""
        if self._plan.output:
            results.write(self._plan.results, self._plan.output)

    def _cold(self, step: _Step) -> Iterator[Sample]:
        assert step.link
        link = self._session.place.registry.link
        if step.link != link.profile:
            link.change(step.link)
        start = self._session.start(step.image, step.mode, wait_local=self._plan.wait_local)
        with self._session.node(step.mode) as node:
            yield measure(self._session.place, node, start)[0]

    def _local(self, step: _Step) -> Iterator[Sample]:
        start = self._session.start(step.image, step.mode, pulled=True)
        with self._session.node(step.mode) as node:
            self._session.say(f"{step.image.name}, {step.mode.name}: pulling")
            self._session.provide(node, step.image, step.mode)
            for _ in range(step.count):
                sample, workload = measure(self._session.place, node, start)
                self._note_touched(step, node)
                workload.stop()
                yield sample

    def _note_facts(self, step: _Step) -> None:
        publisher, known = self._session.publisher, self._plan.results.images
        name = step.image.name
        if name not in known:
            known[name] = publisher.facts(step.image)
        if step.mode.variant == PROFILED and known[name].profile_bytes is None:
            size = publisher.profile_bytes(step.image)
            known[name] = msgspec.structs.replace(known[name], profile_bytes=size)

    def _note_touched(self, step: _Step, node: Node) -> None:
        """Before the next start has the kernel forget it."""
        facts = self._plan.results.images[step.image.name]
        unpacked = node.unpacked()
        if unpacked and not facts.touched:
            found = touched(unpacked)
            self._plan.results.images[step.image.name] = msgspec.structs.replace(
                facts, touched=found
            )


def _described(sample: Sample) -> str:
    link = f", {sample.link}" if sample.link else ""
    text = f"{sample.image}, {sample.mode}{link}: ready after {sample.ready:.2f} s"
    if sample.ready_bytes:
        text += f" and {sample.ready_bytes / 1e6:.1f} MB in {sample.ready_requests} requests"
    if sample.local:
        text += f", local after {sample.local:.1f} s"
    return text
