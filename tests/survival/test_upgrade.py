"""From one version of the program to the next, under containers that read, and back."""

from __future__ import annotations

import signal
import time
from typing import TYPE_CHECKING

import pytest

from tests.support.gateway import Gateway, gateway
from tests.support.leaks import becomes, shown_in
from tests.support.versions import Installed, install_current, install_earlier
from tests.support.workload import push_workload, running_load

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Iterator
    from pathlib import Path

    from tests.support.instance import Instance
    from tests.support.registry import RunningRegistry

pytestmark = pytest.mark.root

RATE = 10e6  # bytes a second: the download goes on over the first upgrades
MODES = ("fuse", "erofs")


@pytest.fixture(scope="module")
def way(registry: RunningRegistry, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    push_workload(registry, tmp_path_factory.mktemp("workload"))
    with gateway(registry.host, rate=RATE) as made:
        yield made


def test_containers_see_nothing_of_an_upgrade(here: Instance, way: Gateway, tmp_path: Path) -> None:
    """By a restart as a service manager does it, and by `daemon --replace`; of the earlier version,
    which has mounted everything, nothing is on the disk any more in the end."""
    earlier = install_earlier(tmp_path / "earlier")
    current = install_current(tmp_path / "current")
    assert earlier.python != current.python
    daemon = _launch(here, earlier)
    targets = [here.directory(mode) for mode in MODES]
    for target in targets:
        here.succeed("mount", way.reference("workload"), target, "--mode", target.name)
    with running_load() as load:
        for target in targets:
            load.read(target)
            load.start_fresh(target)
        for program, replaces in (
            (current, False),
            (earlier, False),
            (current, True),
            (earlier, True),
            (current, True),
        ):
            time.sleep(1)
            if not replaces:
                daemon.send_signal(signal.SIGTERM)
                assert daemon.wait(60) == 0
            successor = _launch(here, program, *["--replace"] * replaces)
            assert daemon.wait(60) == 0
            daemon = successor
        earlier.remove()
        seen = load.end()
    print(f"upgrades; rounds: {seen.rounds}; the longest read: {seen.longest:.2f} s")
    assert seen.problems == []
    assert seen.rounds["fresh starts"]
    for target in targets:
        here.succeed("umount", target)
    becomes(lambda: shown_in(here), [])
    daemon.send_signal(signal.SIGINT)
    assert daemon.wait(60) == 0
    assert here.mounts() == []
    assert here.holders() == []


def _launch(here: Instance, program: Installed, *options: str) -> subprocess.Popen[bytes]:
    daemon = here.launch(*options, program=(str(program.python), "-m", "snapshotter.cli.main"))
    becomes(lambda: (here.answers(daemon), daemon.poll()), (True, None))
    return daemon
