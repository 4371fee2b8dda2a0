"""Benchmarks end with numbers that make sense. How large they are is not for a test to say."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from snapshotter.bench import (
    building,
    handover,
    mounting,
    opening,
    workloads,
)
from snapshotter.bench.errors import BenchError

if TYPE_CHECKING:
    from pathlib import Path

    from snapshotter.bench.corpus import RawLayer
    from snapshotter.bench.images import StoredImage
    from snapshotter.bench.tables import Table
    from snapshotter.demo.workspace import Workspace

SAMPLES = 2


def numbers(table: Table) -> list[float]:
    """All cells that are numbers; each row has a cell a column."""
    assert all(len(row) == len(table.columns) for row in table.rows)
    return [cell for row in table.rows for cell in row if not isinstance(cell, str)]


def column(table: Table, name: str) -> list[float]:
    cells = [row[table.columns.index(name)] for row in table.rows]
    assert all(not isinstance(cell, str) for cell in cells)
    return [float(cell) for cell in cells]


def test_throughput_has_a_row_for_each_form_and_work(images: list[StoredImage]) -> None:
    table = building.throughput(images, SAMPLES)
    assert len(table.rows) == 3 * len(images)
    assert min(numbers(table)) > 0
    image = images[0]
    for raw, compressed in zip(
        column(table, "raw MB/s")[:3], column(table, "compressed MB/s")[:3], strict=True
    ):
        assert raw / compressed == pytest.approx(image.raw_size / image.size)


def test_parts_are_measured_one_by_one(image: StoredImage, layers: tuple[RawLayer, ...]) -> None:
    table = building.parts(image, layers, SAMPLES)
    assert len(table.rows) == 7
    assert min(numbers(table)) > 0


def test_sections_add_up_to_less_than_the_index(images: list[StoredImage]) -> None:
    table = building.sizes(images)
    sections = [column(table, f"{name} KB") for name in ("tree", "digests", "seek", "windows")]
    for whole, *held in zip(column(table, "index KB"), *sections, strict=True):
        assert 0 < sum(held) < whole
    # 13 chunks of 256 KiB, and a digest of 32 bytes for each
    assert sections[1] == [13 * 32 / 1e3] * len(images)


def test_one_frame_is_what_frames_are_compared_with(
    image: StoredImage, layers: tuple[RawLayer, ...]
) -> None:
    table = building.frames(layers, image.size)
    assert column(table, "% more than one frame")[-1] == 0
    assert min(column(table, "MB")) > 3  # random bytes do not compress


@pytest.mark.root
def test_opening_is_measured_for_each_number_of_files(tmp_path: Path) -> None:
    opened, taken = opening.opening([500, 1000], tmp_path, SAMPLES)
    assert [row[0] for row in taken.rows] == [500, 1000]
    assert len(opened.rows) == 12
    assert min(numbers(opened)) > 0
    assert min(numbers(taken)) > 0
    assert list(tmp_path.iterdir()) == []


def test_work_is_shared_out_among_jobs(tree: Path) -> None:
    made = workloads.workloads(workloads.list_files(tree))
    assert {workload.jobs for workload in made} == {1, 4}
    for workload in made:
        assert workload.run(tree, lambda: None).seconds > 0


def test_a_job_that_fails_is_an_error(tree: Path, tmp_path: Path) -> None:
    for workload in workloads.workloads(workloads.list_files(tree)):
        if workload.name.startswith("list") and workload.jobs > 1:
            with pytest.raises(BenchError, match="failed"):
                workload.run(tmp_path, lambda: None)


@pytest.mark.root
def test_mounting_is_measured_without_any_data(workspace: Workspace) -> None:
    table = mounting.mounting(1000, workspace, SAMPLES)
    assert {row[:2] for row in table.rows} == {
        (mode, cache) for mode in ("fuse", "erofs") for cache in ("dropped", "warm")
    }
    assert min(numbers(table)) > 0


@pytest.mark.root
def test_a_reader_waits_while_one_daemon_follows_another(workspace: Workspace) -> None:
    waits, memory = handover.handover(workspace, 2, 100, 1)
    assert len(waits.rows) == 2
    assert min(numbers(waits)) > 0
    for median, longest, answers in zip(
        *(column(waits, name) for name in waits.columns[2:]), strict=True
    ):
        assert median == longest < answers + handover.SETTLE * 1e3
    assert len(memory.rows) == 3
    for resident, private in zip(
        *(column(memory, name) for name in memory.columns[1:]), strict=True
    ):
        assert 0 < private < resident
