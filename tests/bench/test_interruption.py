"""Whatever a benchmark is doing: when it is told to end, it does, and nothing of it is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

from snapshotter.demo.workspace import marked_processes, mounts_below
from tests.support.cgroups import cgroups_named

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.root

SECONDS = 120.0


def is_mounted(kind: str) -> Callable[[Path], bool]:
    """Whether something of a workspace is mounted at a place of that name."""
    return lambda workspace: any(kind in str(point) for point in mounts_below(workspace))


def has(pattern: str) -> Callable[[Path], bool]:
    return lambda workspace: any(workspace.glob(pattern))


INDEX = ["index", "--corpus", "{tree}"]
READ = ["read", "--samples", "99", "--corpus", "{tree}"]
HANDOVER = ["handover", "--images", "2", "--files", "100", "--samples", "99"]
LAYERS = ["layers", "--layers", "2", "--samples", "99"]
COLD_START = ["cold-start", "--images", "{list}", "--cache", "{cache}", "--mode"]
CONCURRENT = ["concurrent", "--image", "tiny", "--starts", "3", *COLD_START[1:]]


@pytest.mark.parametrize(
    ("arguments", "begun", "number"),
    [
        (INDEX, has("image-*/**/sha256/*"), signal.SIGTERM),
        (READ, is_mounted("local/native"), signal.SIGTERM),
        (READ, is_mounted("local/native"), signal.SIGINT),
        (HANDOVER, has("*/reads"), signal.SIGTERM),
        (LAYERS, has("node-2"), signal.SIGTERM),
        ([*COLD_START, "firstbyte"], has("node-0-containerd/*.pid"), signal.SIGTERM),
        ([*COLD_START, "firstbyte"], has("node-0-containerd/*.pid"), signal.SIGINT),
        (
            [*COLD_START, "podman-layer-store"],
            has("node-0-podman/graph/overlay/*/merged"),
            signal.SIGTERM,
        ),
        ([*CONCURRENT, "firstbyte"], has("node-0-containerd/*.pid"), signal.SIGTERM),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_it_ends_when_its_whole_group_is_told_so(
    arguments: list[str],
    begun: Callable[[Path], bool],
    number: signal.Signals,
    tree: Path,
    catalogue: Path,
    workplace: Path,
    tmp_path: Path,
) -> None:
    """As Ctrl-C and timeout(1) do it: the signal reaches all processes that are in the group."""
    words = [word.format(tree=tree, list=catalogue, cache=tmp_path) for word in arguments]
    command = [sys.executable, "-m", "snapshotter.cli.main", "bench", *words]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, process_group=0
    ) as running:
        end = time.monotonic() + SECONDS
        while not (reached := any(map(begun, workplace.iterdir()))) and time.monotonic() < end:
            assert running.poll() is None
            time.sleep(0.01)
        (workspace,) = workplace.iterdir()
        os.killpg(running.pid, number)
        _, said = running.communicate(timeout=SECONDS)
    assert reached
    assert running.returncode == 128 + number, said
    assert said.splitlines()[-1] == f"firstbyte: interrupted by {number.name}"
    assert "Traceback" not in said
    assert not workspace.exists()
    assert mounts_below(workspace) == []
    assert marked_processes(workspace) == []
    assert cgroups_named(workspace.name) == []
