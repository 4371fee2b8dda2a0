"""For all tests: one that does not run is one that fails. And what many of them start."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

from tests.support.instance import Instance, instance
from tests.support.registry import RunningRegistry, docker_registry

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

pytest_plugins = ["pytester"]

# Images of containers like to set it. With it the daemon compiles itself each time it starts, which
# is a third of what a start takes, and tests start it hundreds of times.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

settings.register_profile("firstbyte", deadline=None)  # tests never assert on time
settings.load_profile("firstbyte")

LONGEST = (
    "podman/test_image_store.py",
    "endtoend/test_same_tree.py",
    "setup/test_install.py",
    "containerd/test_storm.py",
    "containerd/test_restart.py",
    "endtoend/test_profiles.py",
    "demo/test_demo.py",
    "podman/test_image_store_kills.py",
    "containerd/test_conformance_kills.py",
    "daemon/test_daemon.py",
    "containerd/test_lazy_pull.py",
    "endtoend/test_survival.py",
    "podman/test_layer_store_toc.py",
    "endtoend/test_integrity.py",
    "daemon/test_bounds.py",
    "podman/test_layer_store.py",
    "survival/test_waiting.py",
    "containerd/test_lazy_remove.py",
    "cli/test_bad_input.py",
    "podman/test_rootless.py",
    "survival/test_kills.py",
    "survival/test_away.py",
    "survival/test_storms.py",
    "bench/test_read.py",
    "daemon/test_layers_from_disk.py",
    "containerd/test_conformance.py",
    "survival/test_upgrade.py",
    "bench/test_interruption.py",
    "survival/test_memory.py",
    "containerd/test_conformance_storms.py",
    "demo/test_sample.py",
    "containerd/test_survival.py",
    "containerd/test_conformance_info.py",
    "bench/test_cold_start.py",
    "podman/test_same_tree.py",
    "bench/test_layers.py",
    "containerd/test_conformance_files.py",
    "fetch/test_pacing.py",
    "containerd/test_lazy_registries.py",
    "podman/test_crashes.py",
    "containerd/test_lazy_users.py",
)
"""Files that take 20 seconds and more, the longest first."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what takes longest: else one worker comes to it when the others have ended."""
    tests = Path(__file__).parent
    turns = {tests / name: turn for turn, name in enumerate(LONGEST)}
    items.sort(key=lambda item: turns.get(item.path, len(turns)))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A skipped test fails, with the reason it gave for not running."""
    report = yield
    if not hasattr(report, "wasxfail"):
        _fail_if_skipped(report)
    return report


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """A skipped module fails, too."""
    report = yield
    _fail_if_skipped(report)
    return report


def _fail_if_skipped(report: pytest.TestReport | pytest.CollectReport) -> None:
    if report.skipped:
        # pytest gives (file, line, reason) for skips.
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome = "failed"
        # With its name, because xdist shows equal texts once.
        report.longrepr = f"{report.nodeid}: skipped, which counts as a failure: {reason}"


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningRegistry]:
    """A real registry for all tests of a module."""
    with docker_registry(tmp_path_factory.mktemp("registry")) as running:
        yield running


@pytest.fixture
def here() -> Iterator[Instance]:
    """An instance for each test."""
    with instance() as made:
        yield made
