"""`firstbyte demo` as a user runs it: it shows the main job, and leaves nothing behind."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from snapshotter.mounts.table import read_mounts
from tests.support.cgroups import cgroups_named
from tests.support.layouts import write_layout
from tests.support.rootfs import as_layer

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.root

SECONDS = 120.0
STAGES = [
    "start a registry",
    "copy oci:",
    "build the file index",
    "start a daemon",
    "mount the image",
    "start a container",
    "wait until the rest",
    "start a containerd",
    "pull all of the image",
]
STAGES_OF_PODMAN = ["add the image to podman", "start a container"]
STAGES_OF_CONTAINERD = [
    "start a containerd that",
    "pull the image",
    "start a container",
    "wait until the rest",
    "pull all of the image",
]


@pytest.fixture(scope="module")
def small_image(tmp_path_factory: pytest.TempPathFactory, rootfs: Path) -> str:
    """A shell that says when it is ready, and stays."""
    layout = tmp_path_factory.mktemp("small") / "layout"
    script = "ls -l /bin; cat /etc/passwd; echo ready at last; sleep 600"
    config = {"config": {"Cmd": ["sh", "-c", script]}}
    write_layout(layout, [as_layer(rootfs)], tag="small", config=config)
    return f"oci:{layout}:small"


class Demo:
    """A running `firstbyte demo`. `said` is what it has said so far on standard error, and `names`
    are those of its workspaces in the temporary directory it was given."""

    def __init__(self, directory: Path, *arguments: str) -> None:
        self._directory = directory
        self.names: set[str] = set()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "snapshotter.cli.main", "demo", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env={**os.environ, "TMPDIR": str(directory)},
        )
        self.said: list[str] = []
        self._lines: queue.Queue[str] = queue.Queue()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr
        for line in self.process.stderr:
            self._lines.put(line.rstrip("\n"))
        self._lines.put("* (ended)")

    def wait_for(self, beginning: str) -> None:
        """Read on until it announces a step."""
        while not self.said or not self.said[-1].startswith(f"* {beginning}"):
            self.said.append(self._lines.get(timeout=SECONDS))
            assert self.said[-1] != "* (ended)", self.said
        self.names |= {path.name for path in self._directory.iterdir()}

    def finish(self) -> tuple[int, str]:
        """Its exit status and standard output, once it has ended."""
        assert self.process.stdout
        output = self.process.stdout.read()
        status = self.process.wait(SECONDS)
        self._reader.join()
        while (line := self._lines.get_nowait()) != "* (ended)":
            self.said.append(line)
        self.process.stdout.close()
        assert self.process.stderr
        self.process.stderr.close()
        return status, output


@contextlib.contextmanager
def demo(*arguments: str) -> Iterator[Demo]:
    """Run it in a temporary directory of its own; when it has ended, nothing of it is left."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as directory:
        running = Demo(Path(directory), *arguments)
        try:
            yield running
        finally:
            if running.process.poll() is None:  # the test has failed
                running.process.terminate()
                running.finish()
        assert running.process.poll() is not None
        assert list(Path(directory).iterdir()) == []
        assert traces(directory, running.names) == []


def traces(directory: str, names: set[str]) -> list[str]:
    """Mounts, processes and cgroups of workspaces with these names in a directory."""
    mounts = [os.fsdecode(entry.point) for entry in read_mounts()]
    found = [f"mount {point}" for point in mounts if point.startswith(directory)]
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if os.fsencode(directory) in (entry / "environ").read_bytes():
                found.append(f"process {entry.name}")
    for name in names:
        found += [f"cgroup {path}" for path in cgroups_named(name)]
    return found


@pytest.mark.parametrize(
    ("runtime", "provided"), [("runc", "mounted"), ("containerd", "pulled"), ("podman", "added")]
)
def test_it_starts_an_image_both_ways_and_says_how_long_it_took(
    small_image: str, runtime: str, provided: str
) -> None:
    arguments = [small_image, "--runtime", runtime, "--ready-line", "^ready at last$", "--json"]
    with demo(*arguments) as running:
        running.wait_for("start a registry")
        status, output = running.finish()
        assert status == 0, running.said
    timeline = json.loads(output)
    lazy, full = timeline["lazy"], timeline["full_pull"]
    assert timeline["runtime"] == runtime
    assert 0 < lazy[f"{provided}_seconds"] < lazy["ready_seconds"] < lazy["local_seconds"]
    assert 0 < full["pulled_seconds"] < full["ready_seconds"]
    assert lazy["fetched_bytes"] > 0
    assert timeline["layers"] == 1
    assert timeline["ratio"] == full["ready_seconds"] / lazy["ready_seconds"]


def test_the_timeline_is_what_it_prints_on_standard_output(small_image: str) -> None:
    with demo(small_image) as running:
        status, output = running.finish()
        assert status == 0, running.said
    assert re.search(r"lazy +mounted +after +\d+\.\d\d s", output)
    assert re.search(r"The workload was ready \d+\.\d times sooner\.", output)


@pytest.mark.parametrize(
    ("runtime", "stage"),
    [
        *(("runc", stage) for stage in STAGES),
        *(("containerd", stage) for stage in STAGES_OF_CONTAINERD),
        *(("podman", stage) for stage in STAGES_OF_PODMAN),
    ],
)
def test_ctrl_c_at_any_stage_leaves_nothing(small_image: str, runtime: str, stage: str) -> None:
    with demo(small_image, "--runtime", runtime) as running:
        running.wait_for(stage)
        os.killpg(running.process.pid, signal.SIGINT)
        assert running.finish() == (130, ""), running.said
    assert running.said[-1] == "firstbyte: interrupted by SIGINT"
    assert not [line for line in running.said if "Traceback" in line]


def test_sigterm_is_as_good_and_a_second_signal_does_no_harm(small_image: str) -> None:
    with demo(small_image) as running:
        running.wait_for("wait until the rest")
        running.process.terminate()
        running.wait_for("clean up")
        running.process.send_signal(signal.SIGINT)
        assert running.finish() == (143, "")


def test_ctrl_c_while_the_sample_image_is_made_leaves_nothing() -> None:
    with demo() as running:
        running.wait_for("make the sample image")
        os.killpg(running.process.pid, signal.SIGINT)
        assert running.finish() == (130, ""), running.said


def test_a_workload_that_fails_is_an_error_with_its_last_words(
    tmp_path: Path, rootfs: Path
) -> None:
    config = {"config": {"Cmd": ["sh", "-c", "echo my last words; exit 7"]}}
    write_layout(tmp_path / "layout", [as_layer(rootfs)], tag="x", config=config)
    with demo(f"oci:{tmp_path}/layout:x", "--ready-line", "never said") as running:
        running.wait_for("start a container")
        assert running.finish() == (1, "")
    text = "\n".join(running.said)
    assert "ended with status 7 before it was ready" in text
    assert "my last words" in text


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["x", "--ready-http", "80", "--ready-line", "x"], "exclude each other"),
        (["x", "--ready-http", "port"], "'port' is not PORT"),
        (["x", "--ready-http", "70000"], "'70000' is not PORT"),
        (["x", "--ready-line", "("], "'(' is no pattern"),
        (["--ready-line", "x"], "give an IMAGE"),
    ],
)
def test_contradictory_options_are_refused_at_once(arguments: list[str], problem: str) -> None:
    with demo(*arguments) as running:
        assert running.finish() == (2, "")
    assert problem in running.said[-1]
