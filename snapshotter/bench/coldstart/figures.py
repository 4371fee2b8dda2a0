"""What samples of cold starts amount to: medians, the physical limit, ratios, targets.

The limit of a start is a warm start with a dropped page cache, all being on the local disk, and
what that reads, compressed, over the bandwidth of the link, and two round trips.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING

from snapshotter.bench.coldstart.modes import (
    NO_FILL,
    OVERLAYFS,
    PROFILE,
    STANDARD,
    UNMODIFIED,
    local_for,
    normal_for,
)
from snapshotter.bench.link.profiles import STANDARD as LINKS
from snapshotter.bench.link.profiles import LinkProfile

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from snapshotter.bench.coldstart.results import Results, Sample

_NO_LINK = ""
_SERVICES, _TORCH, _WHOLE = "service", "torch", "reader-100"
_MIDDLE = "200mbit-20ms"  # the link of targets that are about one
_ORDER = {mode.name: number for number, mode in enumerate(STANDARD)}


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of all do not exceed (nearest rank)."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def geometric_mean(values: Iterable[float]) -> float | None:
    """None of nothing."""
    logarithms = [math.log(value) for value in values]
    return math.exp(statistics.fmean(logarithms)) if logarithms else None


@dataclass(frozen=True, slots=True)
class Phases:
    """Medians of the seconds that each phase of a start took."""

    pull: float
    create: float
    start: float
    answer: float


@dataclass(frozen=True)
class Kind:
    """All samples of one image in one mode over one link, at least one."""

    image: str
    mode: str
    link: str
    samples: tuple[Sample, ...]
    limit: float | None
    """Seconds; None if the local start was not measured."""
    needed_bytes: int | None
    """What a local start reads of the image, compressed; None likewise."""

    @property
    def ready(self) -> float:
        """The median."""
        return statistics.median(sample.ready for sample in self.samples)

    @property
    def ready_p95(self) -> float:
        return percentile([sample.ready for sample in self.samples], 0.95)

    @property
    def to_limit(self) -> float | None:
        """How many times the limit the median is."""
        return self.ready / self.limit if self.limit else None

    @property
    def phases(self) -> Phases:
        median, samples = statistics.median, self.samples
        return Phases(
            median(sample.pulled for sample in samples),
            median(sample.created - sample.pulled for sample in samples),
            median(sample.started - sample.created for sample in samples),
            median(sample.ready - sample.started for sample in samples),
        )

    @property
    def stalls(self) -> list[float]:
        """The seconds of single reads, shortest first, of workloads that tell them."""
        return sorted(stall for sample in self.samples for stall in sample.stalls)

    def stall(self, share: float) -> float:
        """A percentile of them, in seconds. There must be some."""
        return percentile(self.stalls, share)

    @property
    def typical(self) -> Sample:
        """The sample in the middle."""
        ordered = sorted(self.samples, key=lambda sample: sample.ready)
        return ordered[(len(ordered) - 1) // 2]

    def median(self, field: str) -> float | None:
        """Of a field of the samples, without those that have none."""
        values = [value for sample in self.samples if (value := getattr(sample, field)) is not None]
        return statistics.median(values) if values else None


@dataclass(frozen=True)
class Target:
    """A goal of the project. `value` is None if it was not measured."""

    name: str
    value: float | None
    at_least: float | None = None
    at_most: float | None = None

    @property
    def met(self) -> bool | None:
        if self.value is None:
            return None
        if self.at_least is not None:
            return self.value >= self.at_least
        return self.at_most is not None and self.value <= self.at_most


class Figures:
    """Everything that is computed from results."""

    def __init__(self, results: Results) -> None:
        self.results = results
        keys = {(sample.image, sample.link, sample.mode) for sample in results.samples}
        images = {name: number for number, name in enumerate(results.images)}
        links = {profile.name: number for number, profile in enumerate(LINKS)}

        def order(key: tuple[str, str, str]) -> tuple[object, ...]:
            image, link, mode = key
            known = (links.get(link, len(links)), link), images.get(image, len(images))
            return (*known, _ORDER.get(mode, len(_ORDER)), mode)

        self.kinds = [self._kind(*key) for key in sorted(keys, key=order)]

    @property
    def links(self) -> list[str]:
        """Those that were measured."""
        return list(dict.fromkeys(kind.link for kind in self.kinds if kind.link))

    def of(self, image: str, mode: str, link: str) -> Kind | None:
        """One kind, if it was measured."""
        wanted = (image, mode, link)
        return next((k for k in self.kinds if (k.image, k.mode, k.link) == wanted), None)

    def speedup(self, kind: Kind) -> float | None:
        """How many times as long a normal pull and start by the same runner takes."""
        normal = self.of(kind.image, normal_for(kind.mode).name, kind.link)
        return normal.ready / kind.ready if normal else None

    def mean_to_limit(self, mode: str, links: Sequence[str]) -> float | None:
        """The geometric mean of ratios to the limit, over all images and these links."""
        return geometric_mean(
            ratio
            for kind in self.kinds
            if kind.mode == mode and kind.link in links and (ratio := kind.to_limit)
        )

    def mean_speedup(self, mode: str, links: Sequence[str], images: Iterable[str]) -> float | None:
        """The geometric mean of `speedup` over images and links."""
        chosen = set(images)
        return geometric_mean(
            speedup
            for kind in self.kinds
            if kind.mode == mode and kind.link in links and kind.image in chosen
            if (speedup := self.speedup(kind))
        )

    def targets(self) -> list[Target]:
        """The goals that cold starts are measured against."""
        four = [profile.name for profile in LINKS[:4]]
        services = [n for n, facts in self.results.images.items() if facts.group == _SERVICES]
        whole = [
            kind.ready / normal.ready
            for kind in self.kinds
            if kind.image == _WHOLE and kind.mode == UNMODIFIED.name
            if (normal := self.of(kind.image, OVERLAYFS.name, kind.link))
        ]
        fetched = "bytes fetched until ready, without the background's / bytes in the profile, most"
        reference = f"normal pull and start / FirstByte with profile, {_MIDDLE}"
        profile = PROFILE.name
        return [
            Target(
                "t_ready / limit with profile, geometric mean over images and the first four links",
                self.mean_to_limit(profile, four),
                at_most=1.15,
            ),
            Target(
                "the same, unmodified gzip image without profile",
                self.mean_to_limit(UNMODIFIED.name, four),
                at_most=1.6,
            ),
            Target(
                f"{reference}, service images",
                self.mean_speedup(profile, [_MIDDLE], services),
                at_least=8,
            ),
            Target(
                f"{reference}, {_TORCH}",
                self.mean_speedup(profile, [_MIDDLE], [_TORCH]),
                at_least=4,
            ),
            Target(
                "reads all of the image: FirstByte / normal pull, worst link",
                max(whole, default=None),
                at_most=1.0,
            ),
            Target(
                f"{fetched}, with profile",
                max(self._to_profile(profile), default=None),
                at_most=1.1,
            ),
            Target(
                f"{fetched}, without",
                max(self._to_profile(UNMODIFIED.name), default=None),
                at_most=4.0,
            ),
            Target(
                "longest but 1 % of a workload's reads: beside the background download / without "
                "it, worst",
                max(self._added_stalls(), default=None),
                at_most=1.2,
            ),
        ]

    def _to_profile(self, mode: str) -> list[float]:
        return [
            needed / size
            for kind in self.kinds
            if kind.mode == mode and (size := self.results.images[kind.image].profile_bytes)
            if (needed := kind.median("needed_bytes")) is not None
        ]

    def _added_stalls(self) -> list[float]:
        """How many times as long the 99th percentile of reads is while the rest is downloaded."""
        return [
            kind.stall(0.99) / alone.stall(0.99)
            for kind in self.kinds
            if kind.mode == UNMODIFIED.name and kind.stalls
            if (alone := self.of(kind.image, NO_FILL.name, kind.link)) and alone.stalls
        ]

    def _kind(self, image: str, link: str, mode: str) -> Kind:
        samples = tuple(self.results.of(image, mode, link))
        facts = self.results.images.get(image)
        needed = facts.touched.compressed_bytes if facts and facts.touched else None
        local = self.results.of(image, local_for(mode).name, _NO_LINK)
        limit = None
        if local and needed is not None and link:
            profile = LinkProfile.parse(link)
            warm = statistics.median(sample.ready for sample in local)
            limit = warm + 8 * needed / profile.bandwidth + 2 * profile.rtt
        return Kind(image, mode, link, samples, limit, needed)
