"""`firstbyte bench read`, of which all tests look at one run: it takes half a minute."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, NamedTuple

import pytest
from click.testing import CliRunner

from snapshotter.bench import fio, timing
from snapshotter.bench.reading import MODES
from snapshotter.cli import bench, benching
from snapshotter.cli.main import main
from tests.bench.conftest import SMALL_FILES
from tests.bench.test_results import column, numbers

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from snapshotter.bench.tables import Table

pytestmark = pytest.mark.root


class Run(NamedTuple):
    """What it has measured, and what it has printed of that."""

    conditions: Table
    modes: Sequence[Table]
    by_fio: Table
    first_reads: Table
    printed: str
    dropped: Path
    """What it has told the kernel to drop."""


@pytest.fixture(scope="module")
def run(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The kernel does not hear of it: with what is measured, whatever the tests beside this one
    use would go from memory, 88 times, and come back from the disk."""
    dropped = tmp_path_factory.mktemp("kernel") / "drop_caches"
    shown: list[Table] = []

    def show(results: Sequence[Table], as_json: bool, as_markdown: bool) -> None:
        shown.extend(results)
        benching.show(results, as_json, as_markdown)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(fio, "_SECONDS", 0.05)
        patched.setattr(timing, "_DROP_CACHES", dropped)
        patched.setattr(bench, "show", show)
        command = ["bench", "read", "--json", "--samples", "2"]
        command += ["--corpus", str(tree), "--corpus", str(tree / "part-0")]
        done = CliRunner().invoke(main, command)
    assert done.exit_code == 0, done.stderr
    conditions, *modes, by_fio, first_reads = shown
    return Run(conditions, modes, by_fio, first_reads, done.stdout, dropped)


def test_results_come_as_json_with_their_conditions(run: Run) -> None:
    first, *others = json.loads(run.printed)
    assert first == run.conditions.title == "Conditions"
    assert others == [table.title for table in (*run.modes, run.by_fio, run.first_reads)]


def test_first_reads_find_nothing_in_memory(run: Run) -> None:
    """Neither pages nor names nor inodes (Linux, Documentation/admin-guide/sysctl/vm.rst)."""
    assert run.dropped.read_text() == "3"


def test_all_modes_do_the_same_work(run: Run) -> None:
    assert run.by_fio.title.startswith("fio ")
    assert {row[2] for row in run.by_fio.rows} == {"overlayfs", *MODES}
    assert tuple(table.title.rpartition(" ")[2] for table in run.modes) == MODES
    first, *_ = run.modes
    assert "1 of 2 layers come from the disk" in first.note
    for table in run.modes:
        assert [row[:5] for row in table.rows] == [row[:5] for row in first.rows]
        assert {row[:3] for row in table.rows} == {
            (work, jobs, cache)
            for work, jobs, _ in {row[:3] for row in table.rows}
            for cache in ("dropped", "warm")
        }
        assert min(numbers(table)) > 0
        for low, middle, high in zip(
            *(column(table, name) for name in ("lowest", "ratio", "highest")), strict=True
        ):
            assert low <= middle <= high


def test_first_reads_come_from_everywhere(run: Run) -> None:
    table = run.first_reads
    assert f"{SMALL_FILES + 1} files" in table.note
    assert len(table.rows) == 4
    assert table.rows[0][-1] == 1  # it is what the others are compared with
    for row in table.rows:
        tree, first_page, everything = (float(cell) for cell in row[1:4])
        assert 0 < tree < first_page < everything
