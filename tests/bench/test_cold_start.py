"""Cold starts, measured from end to end with an image that starts in no time."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import msgspec
import pytest

from snapshotter.bench.coldstart import results
from snapshotter.bench.coldstart.figures import Figures
from snapshotter.bench.coldstart.modes import STANDARD, Mode
from snapshotter.bench.coldstart.residency import resident, touched
from snapshotter.bench.errors import BenchError
from snapshotter.demo.containerd import Containerd
from snapshotter.demo.interruption import Interruption
from snapshotter.demo.workspace import Workspace
from tests.bench.test_command import bench

pytestmark = pytest.mark.root

LINK = "200mbit-5ms"
MODES = ("local", "overlayfs", "firstbyte", "firstbyte-no-fill")
PODMAN_MODES = ("podman", "podman-image-store", "podman-layer-store", "podman-local")


def test_starts_are_measured_and_what_is_missing_is_measured_later(
    catalogue: Path, workplace: Path, tmp_path: Path
) -> None:
    kept, written = tmp_path / "results.json", tmp_path / "report"
    command = [
        "cold-start",
        "--images",
        catalogue,
        "--link",
        LINK,
        "--samples",
        "1",
        "--resume",
        kept,
    ]
    command += ["--cache", tmp_path / "cache"]
    done = bench(*command, "--mode", "overlayfs", "--mode", "local", "--report", written)
    assert done.returncode == 0, done.stderr
    done = bench(*command, *(word for mode in MODES for word in ("--mode", mode)), "--json")
    assert done.returncode == 0, done.stderr
    assert "[1/2] tiny, firstbyte" in done.stderr

    found = results.read(kept)
    assert json.loads(done.stdout)["images"].keys() == {"tiny"}
    by_mode = {sample.mode: sample for sample in found.samples}
    assert by_mode.keys() == set(MODES)
    size = found.images["tiny"].compressed_bytes
    for mode, sample in by_mode.items():
        assert 0 <= sample.pulled <= sample.created <= sample.started <= sample.ready
        assert sample.disk_bytes
        if mode == "local":
            assert sample.total_bytes == 0
        else:
            assert 0 < sample.ready_requests <= sample.total_requests
            if mode == "firstbyte-no-fill":
                assert sample.local is None
            else:
                assert size <= sample.total_bytes <= 1.5 * size
                assert sample.local
            assert sample.curve[-1][1] == sample.total_bytes
    read = found.images["tiny"].touched
    assert read
    assert Path("/bin/cat").stat().st_size < read.bytes
    assert 0 < read.compressed_bytes < read.bytes
    assert len(found.conditions) == 2
    assert (written / "report.html").read_text().startswith("<!doctype html>")
    assert (written / f"timeline-{LINK}.svg").exists()


def test_podman_starts_images_from_both_of_its_stores(
    catalogue: Path, workplace: Path, tmp_path: Path
) -> None:
    command = ["cold-start", "--images", catalogue, "--link", LINK, "--samples", "1", "--json"]
    command += [word for mode in PODMAN_MODES for word in ("--mode", mode)]
    done = bench(*command, "--cache", tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    found = msgspec.json.decode(done.stdout, type=results.Results)
    by_mode = {sample.mode: sample for sample in found.samples}
    assert by_mode.keys() == set(PODMAN_MODES)
    for mode, sample in by_mode.items():
        assert 0 <= sample.pulled <= sample.created <= sample.started <= sample.ready
        assert sample.disk_bytes
        assert (sample.needed_bytes is not None) == mode.endswith("-store")
        assert (sample.daemon_cpu_seconds is not None) == mode.endswith("-store")
    assert found.images["tiny"].touched
    figures = Figures(found)
    for mode in ("podman-image-store", "podman-layer-store"):
        kind = figures.of("tiny", mode, LINK)
        assert kind
        assert kind.limit
        assert figures.speedup(kind)


def test_an_image_that_does_not_get_ready_says_what_it_printed(
    catalogue: Path, workplace: Path, tmp_path: Path
) -> None:
    path = tmp_path / "images.toml"
    path.write_text(catalogue.read_text().replace("echo ready; sleep 600", "echo oh no; exit 3"))
    done = bench(
        *("cold-start", "--images", path, "--mode", "local", "--cache", tmp_path / "cache")
    )
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last == "firstbyte: the workload of tiny ended with status 3 before it was ready: oh no"


def test_a_mode_is_one_of_ours_or_a_snapshotter_of_some_containerd() -> None:
    for mode in STANDARD:
        assert Mode.parse(mode.name) == mode
    foreign = Mode.parse("stargz@/run/containerd/containerd.sock")
    assert (foreign.snapshotter, foreign.containerd) == (
        "stargz",
        Path("/run/containerd/containerd.sock"),
    )
    with pytest.raises(BenchError, match="no mode 'stargz'"):
        Mode.parse("stargz")


def test_what_is_in_the_page_cache_of_a_file_is_found() -> None:
    with tempfile.NamedTemporaryFile(dir="/var/tmp") as file:  # tmpfs cannot forget
        content = os.urandom(1 << 20)
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)  # no reading ahead
        assert resident(Path(file.name)) == []
        os.pread(file.fileno(), 5000, 8192)
        ((start, end),) = resident(Path(file.name))
        assert start <= 8192
        assert end >= 8192 + 5000
        assert end - start < len(content)


def test_nothing_is_read_of_a_tree_that_nobody_reads(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "link").symlink_to("/etc/passwd")
    found = touched([tmp_path])
    assert (found.files, found.bytes) == (0, 0)


def test_another_containerd_is_measured_and_left_as_it_was(
    catalogue: Path, workplace: Path, tmp_path: Path
) -> None:
    with Interruption() as interruption, Workspace(interruption, print) as workspace:
        other = Containerd(workspace, "other")
        command = ["cold-start", "--images", catalogue, "--link", LINK, "--samples", "1", "--json"]
        command += ["--mode", f"overlayfs@{other.socket}", "--cache", tmp_path / "cache"]
        done = bench(*command)
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        (sample,) = found["samples"]
        assert sample["mode"] == f"overlayfs@{other.socket}"
        assert sample["total_bytes"] >= found["images"]["tiny"]["compressed_bytes"]
        assert other.ctr("images", "list", "--quiet") == ""
        assert other.ctr("containers", "list", "--quiet") == ""


def test_a_containerd_that_does_not_answer_is_an_error_in_one_line(
    catalogue: Path, workplace: Path, tmp_path: Path
) -> None:
    command = ["cold-start", "--images", catalogue, "--mode", f"overlayfs@{tmp_path}/nobody"]
    done = bench(*command, "--cache", tmp_path / "cache")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("firstbyte: no containerd answers at")
