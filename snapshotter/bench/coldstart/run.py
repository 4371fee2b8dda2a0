"""Measures cold starts: what is asked for, in random order, until there are enough samples."""

from __future__ import annotations

import random
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import msgspec

from snapshotter.bench.coldstart import nodes, results
from snapshotter.bench.coldstart.measure import Place, Start, measure
from snapshotter.bench.coldstart.modes import UNMODIFIED
from snapshotter.bench.coldstart.publishing import Publisher
from snapshotter.bench.coldstart.residency import touched
from snapshotter.bench.conditions import Conditions
from snapshotter.bench.link.link import DistantRegistry
from snapshotter.bench.link.namespaces import Connector
from snapshotter.bench.recipes.build import Builder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from snapshotter.bench.coldstart.catalogue import Image
    from snapshotter.bench.coldstart.modes import Mode
    from snapshotter.bench.coldstart.results import Results, Sample
    from snapshotter.bench.link.profiles import LinkProfile
    from snapshotter.demo.workspace import Workspace

_NO_LINK = ""  # of starts that fetch nothing
_GUESSED_SECONDS = 20.0  # for a start of a kind that was not measured yet


@dataclass(frozen=True)
class Plan:
    """What to measure: `samples` of each image in each mode over each link.

    Samples that `results` has already count. After `budget` seconds no start is begun that would
    probably not end in time; None: all are made. `output` is written after each sample.
    """

    images: Sequence[Image]
    modes: Sequence[Mode]
    links: Sequence[LinkProfile]
    samples: int
    wait_local: bool
    cache: Path
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
    with ExitStack() as stack:
        conditions = Conditions(workspace.path)
        registry = DistantRegistry(workspace, plan.links[0])
        connector = Connector(registry.link.near)
        stack.callback(connector.close)
        place = Place(registry, connector, workspace.interruption)
        builder = Builder(workspace, plan.cache, say)
        record = partial(_record, workspace, place)
        publisher = Publisher(workspace, registry, builder, record, say)
        runner = _Runner(workspace, plan, place, publisher, say)
        try:
            runner.run(steps)
        finally:
            known = {str(what): str(value) for what, value in conditions.table().rows}
            plan.results.conditions.append(known)
            runner.keep()
    return plan.results


def _record(
    workspace: Workspace, place: Place, image: Image, repository: str, target: Path
) -> None:
    node = nodes.Lazy(workspace, f"record-{image.name}")
    try:
        start = Start(image, UNMODIFIED.name, repository, pulled=False, wait_local=False)
        measure(place, node, start)
        node.export_profile(f"{place.registry.host}/{repository}:latest", target)
    finally:
        node.close()


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
    def __init__(
        self,
        workspace: Workspace,
        plan: Plan,
        place: Place,
        publisher: Publisher,
        say: Callable[[str], None],
    ) -> None:
        self._workspace = workspace
        self._plan = plan
        self._place = place
        self._publisher = publisher
        self._say = say
        self._number = 0
        self._seconds: dict[tuple[str, str, str], float] = {}  # that a step took, the last time

    def run(self, steps: Sequence[_Step]) -> None:
        for step in steps:
            self._publisher.repository(step.image, step.mode.variant)
            if step.image.name not in self._plan.results.images:
                self._plan.results.images[step.image.name] = self._publisher.facts(step.image)
        began, done, count = time.monotonic(), 0, sum(step.count for step in steps)
        for step in steps:
            kind = step.image.name, step.mode.name, step.link.name if step.link else _NO_LINK
            expected = self._seconds.get(kind, max([*self._seconds.values(), _GUESSED_SECONDS]))
            spent = time.monotonic() - began
            if self._plan.budget is not None and spent + expected > self._plan.budget:
                self._say(f"the time is used up: {count - done} samples are left")
                return
            for sample in self._local(step) if step.mode.local else self._cold(step):
                done += 1
                self._plan.results.samples.append(sample)
                self.keep()
                self._say(f"[{done}/{count}] {_described(sample)}")
            self._seconds[kind] = time.monotonic() - began - spent

    def keep(self) -> None:
        """Write what there is."""
        if self._plan.output:
            results.write(self._plan.results, self._plan.output)

    def _cold(self, step: _Step) -> Iterator[Sample]:
        assert step.link
        if step.link != self._place.registry.link.profile:
            self._place.registry.link.change(step.link)
        node = self._node(step.mode)
        try:
            yield measure(self._place, node, self._start(step))[0]
        finally:
            node.close()

    def _local(self, step: _Step) -> Iterator[Sample]:
        node = self._node(step.mode)
        try:
            start = self._start(step)
            reference = f"{self._place.registry.direct}/{start.repository}:latest"
            self._say(f"{step.image.name}, {step.mode.name}: pulling")
            node.pull(reference)
            while (state := node.local()) and state.here < state.total:
                self._workspace.interruption.sleep(0.1)
            for _ in range(step.count):
                sample, task = measure(self._place, node, start)
                self._note_touched(step, node)
                task.stop()
                yield sample
        finally:
            node.close()

    def _note_touched(self, step: _Step, node: nodes.Node) -> None:
        """While the workload still runs: what it holds in memory is not forgotten."""
        facts = self._plan.results.images[step.image.name]
        if isinstance(node, nodes.Unpacking) and not facts.touched:
            found = touched(node.lower_directories())
            self._plan.results.images[step.image.name] = msgspec.structs.replace(
                facts, touched=found
            )

    def _node(self, mode: Mode) -> nodes.Node:
        self._number += 1
        return nodes.make(self._workspace, f"node-{self._number}", mode)

    def _start(self, step: _Step) -> Start:
        return Start(
            step.image,
            step.mode.name,
            self._publisher.repository(step.image, step.mode.variant),
            pulled=step.mode.local,
            wait_local=self._plan.wait_local,
        )


def _described(sample: Sample) -> str:
    link = f", {sample.link}" if sample.link else ""
    text = f"{sample.image}, {sample.mode}{link}: ready after {sample.ready:.2f} s"
    if sample.ready_bytes:
        text += f" and {sample.ready_bytes / 1e6:.1f} MB in {sample.ready_requests} requests"
    if sample.local:
        text += f", local after {sample.local:.1f} s"
    return text
