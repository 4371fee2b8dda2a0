"""What samples amount to, and how that is told."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import msgspec
import pytest

from snapshotter.bench import charts
from snapshotter.bench.coldstart import report, results
from snapshotter.bench.coldstart.figures import Figures, Target, geometric_mean, percentile
from snapshotter.bench.coldstart.residency import Touched
from snapshotter.bench.coldstart.results import Facts, Results, Sample
from snapshotter.bench.errors import BenchError

if TYPE_CHECKING:
    from pathlib import Path

LINK = "200mbit-20ms"
READ = Touched(files=10, bytes=4_000_000, compressed_bytes=2_500_000)
LIMIT = 0.5 + 2_500_000 * 8 / 200e6 + 2 * 0.02


def sample(mode: str, ready: float, *, image: str = "redis", **others: Any) -> Sample:
    given: dict[str, Any] = {
        "link": LINK,
        "pulled": ready / 2,
        "created": ready * 0.6,
        "started": ready * 0.7,
        "ready_bytes": 1_000_000,
        "ready_requests": 10,
        "connections": 3,
        "total_bytes": 2_000_000,
        "total_requests": 20,
        "failed_requests": 0,
        "curve": [(0.0, 0), (ready, 1_000_000)],
    }
    return Sample(
        image=image, mode=mode, ready=ready, at="2026-01-01 00:00:00", **{**given, **others}
    )


def parsed(picture: str) -> ElementTree.Element:
    return ElementTree.fromstring(picture)  # noqa: S314  (our own)


@pytest.fixture
def measured() -> Results:
    facts = Facts(reference="x", group="service", layers=2, compressed_bytes=60_000_000)
    stalls = [0.001, 0.002, 0.5]
    return Results(
        conditions=[{"date": "today", "kernel": "<6.18>"}, {"date": "later", "kernel": "<6.18>"}],
        images={
            "redis": Facts(
                reference="x",
                group="service",
                layers=2,
                compressed_bytes=60_000_000,
                touched=READ,
            ),
            "new": facts,
        },
        samples=[
            sample("local", 0.4, link=""),
            sample("local", 0.6, link=""),
            *(sample("overlayfs", ready) for ready in (8.0, 9.0, 40.0)),
            *(
                sample("firstbyte", ready, needed_bytes=5_000_000, stalls=stalls)
                for ready in (0.7, 0.9, 0.8)
            ),
            sample("stargz@/run/c.sock", 4.0),
            sample("firstbyte", 3.0, image="new"),
        ],
    )


def test_a_percentile_is_a_value_that_was_measured() -> None:
    assert percentile([3.0, 1.0, 2.0, 4.0, 5.0], 0.95) == 5.0
    assert percentile([3.0, 1.0, 2.0, 4.0], 0.5) == 2.0
    assert percentile([7.0], 0.0) == 7.0


def test_the_geometric_mean_of_a_ratio_and_its_inverse_is_one() -> None:
    assert geometric_mean([4.0, 0.25]) == pytest.approx(1.0)
    assert geometric_mean([]) is None


def test_the_limit_is_a_local_start_the_bytes_it_reads_and_two_round_trips(
    measured: Results,
) -> None:
    kind = Figures(measured).of("redis", "firstbyte", LINK)
    assert kind
    assert kind.limit == pytest.approx(LIMIT)
    assert kind.ready == 0.8
    assert kind.ready_p95 == 0.9
    assert kind.to_limit == pytest.approx(0.8 / LIMIT)


def test_without_a_local_start_there_is_no_limit(measured: Results) -> None:
    kind = Figures(measured).of("new", "firstbyte", LINK)
    assert kind
    assert kind.limit is None
    assert kind.to_limit is None


def test_phases_are_the_times_between_events(measured: Results) -> None:
    kind = Figures(measured).of("redis", "overlayfs", LINK)
    assert kind
    phases = kind.phases
    assert phases.pull == pytest.approx(4.5)
    assert phases.create == pytest.approx(0.9)
    assert phases.start == pytest.approx(0.9)
    assert phases.answer == pytest.approx(2.7)


def test_a_speedup_is_to_the_normal_pull_over_the_same_link(measured: Results) -> None:
    figures = Figures(measured)
    kind = figures.of("redis", "firstbyte", LINK)
    assert kind
    assert figures.speedup(kind) == pytest.approx(9.0 / 0.8)
    assert figures.mean_speedup("firstbyte", [LINK], ["redis", "new"]) == pytest.approx(9.0 / 0.8)
    assert figures.mean_speedup("firstbyte", ["1000mbit-0.5ms"], ["redis"]) is None


def test_targets_are_met_missed_or_not_measured(measured: Results) -> None:
    assert Target("x", 1.0, at_most=1.15).met is True
    assert Target("x", 1.2, at_most=1.15).met is False
    assert Target("x", 7.9, at_least=8).met is False
    assert Target("x", None, at_least=8).met is None
    found = {target.name: target.met for target in Figures(measured).targets()}
    assert found["the same, unmodified gzip image without profile"] is True
    assert (
        found["t_ready / limit with profile, geometric mean over images and the first four links"]
        is None
    )


def targets(measured: Results, words: str) -> list[Target]:
    return [target for target in Figures(measured).targets() if words in target.name]


def test_bytes_that_were_waited_for_are_compared_with_those_of_the_profile(
    measured: Results,
) -> None:
    measured.images["redis"] = msgspec.structs.replace(
        measured.images["redis"], profile_bytes=4_000_000
    )
    measured.samples.append(sample("firstbyte-profile", 0.6, needed_bytes=4_200_000))
    with_profile, without = targets(measured, "bytes in the profile")
    assert with_profile.value == pytest.approx(1.05)
    assert with_profile.met
    assert without.value == pytest.approx(1.25)


def test_reads_beside_the_background_download_are_compared_with_those_without_it(
    measured: Results,
) -> None:
    (before,) = targets(measured, "beside the background")
    assert before.value is None
    measured.samples.append(sample("firstbyte-no-fill", 0.9, stalls=[0.001, 0.4]))
    (after,) = targets(measured, "beside the background")
    assert after.value == pytest.approx(0.5 / 0.4)
    assert "Single reads of the workload" in report.markdown(measured)


def test_podman_is_compared_with_podman(measured: Results) -> None:
    measured.samples += [
        sample("podman", 6.0),
        sample("podman-local", 0.3, link=""),
        sample("podman-image-store", 2.0, pulled=0.5),
    ]
    figures = Figures(measured)
    kind = figures.of("redis", "podman-image-store", LINK)
    assert kind
    assert figures.speedup(kind) == pytest.approx(3.0)
    assert kind.limit == pytest.approx(LIMIT - 0.5 + 0.3)


def test_results_come_back_as_they_were_kept(measured: Results, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    results.write(measured, path)
    assert results.read(path) == measured


@pytest.mark.parametrize("text", ["", "[]", '{"samples": [{}]}', '{"version": 99}'])
def test_what_are_no_results_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(BenchError):
        results.read(path)


def test_a_report_tells_every_kind_and_escapes_what_it_tells(measured: Results) -> None:
    text, page = report.markdown(measured), report.page(measured)
    for kind in Figures(measured).kinds:
        assert f"| {kind.image} | {kind.mode} |" in text
        assert kind.mode in page
    assert "today; later" in text
    assert "&lt;6.18&gt;" in page
    assert "<6.18>" not in page


def test_a_report_of_nothing_is_possible() -> None:
    assert report.page(Results()).startswith("<!doctype html>")


def test_pictures_are_well_formed_and_show_what_was_measured(measured: Results) -> None:
    pictures = report.pictures(measured)
    assert set(pictures) == {
        f"timeline-{LINK}",
        f"bytes-redis-{LINK}",
        f"bytes-new-{LINK}",
        f"stalls-redis-{LINK}",
    }
    for picture in pictures.values():
        texts = "".join(parsed(picture).itertext())
        assert "firstbyte" in texts


def test_bars_are_as_long_as_their_values() -> None:
    bars = (charts.Bar("a", (1.0, 2.0)), charts.Bar("b", (4.0, 0.0), mark=3.0))
    picture = charts.stacked_bars("t", [charts.Group("g", bars)], ("x", "y"), "s", "limit")
    widths = [
        float(rect.get("width", "0"))
        for rect in parsed(picture).iter("{http://www.w3.org/2000/svg}rect")
        if rect.get("height") == "13"
    ]
    assert widths[1] == pytest.approx(2 * widths[0], abs=0.2)
    assert widths[2] == pytest.approx(4 * widths[0], abs=0.3)


@pytest.mark.parametrize("logarithmic", [False, True])
def test_lines_stay_within_the_picture(logarithmic: bool) -> None:
    line = charts.Line("a", ((0.004, 1.0), (30.0, 55.0), (2000.0, 100.0)), mark=30.0)
    picture = charts.lines("t", [line], "x", "y", logarithmic=logarithmic, percent=True)
    (path,) = parsed(picture).iter("{http://www.w3.org/2000/svg}path")
    numbers = [float(number) for number in re.findall(r"[\d.]+", path.get("d", ""))]
    assert len(numbers) == 6
    assert all(0 <= number <= 860 for number in numbers)
