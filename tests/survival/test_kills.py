"""Nothing that happens to the daemon happens to containers: they read on, and read right."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from index.errors import FirstByteError
from snapshotter.daemon import client, protocol
from snapshotter.daemon.places import Places
from snapshotter.mounts.table import mount_at
from tests.support.gateway import Gateway, gateway
from tests.support.leaks import becomes, footprint, shown_in
from tests.support.workload import Load, push_workload, running_load

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Iterator

    from tests.support.instance import Instance
    from tests.support.registry import RunningRegistry

pytestmark = pytest.mark.root

KILLS = int(os.environ.get("FIRSTBYTE_KILLS", "8"))
"""The environment variable is for those who want more."""

RATE = 10e6  # bytes a second: containers read what the background download has not brought yet
OTHERS = ("other", "another")
READS = ("sums", "find", "python", "fio", "probe", "fresh starts", "mounts")
SOCKETS = 32  # of all kinds, and connections to the registry that are kept for a while


@pytest.fixture(scope="module")
def way(registry: RunningRegistry, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    push_workload(registry, tmp_path_factory.mktemp("workload"), *OTHERS)
    with gateway(registry.host, rate=RATE) as made:
        yield made


def test_containers_see_nothing_of_a_daemon_that_is_killed_again_and_again(
    here: Instance, way: Gateway
) -> None:
    """In both modes that need it, from a store that has nothing of the image yet. Every fourth
    time the registry cannot be reached when the daemon starts, nor for a second after that.

    Others mount images meanwhile, and start containers on them before much of them is here.
    """
    source = random.Random(5)
    daemon = here.start()
    targets = [here.directory(mode) for mode in ("fuse", "erofs")]
    for target in targets:
        here.succeed("mount", way.reference("workload"), target, "--mode", target.name)
    with running_load() as load:
        for target in targets:
            load.read(target)
            load.start_fresh(target)
        load.repeat("mounts", _Mounting(here, way, load))
        for number in range(KILLS):
            time.sleep(source.uniform(0, 1))
            drop_caches()
            if number % 4 == 3:
                with way.closed():
                    daemon = _kill(here, daemon)
                    time.sleep(1)
            else:
                daemon = _kill(here, daemon)
        seen = load.end()
    print(f"{KILLS} kills; rounds: {seen.rounds}; the longest read: {seen.longest:.2f} s")
    assert seen.problems == []
    assert [name for name in READS if not seen.rounds.get(name)] == []
    for target in targets:
        here.succeed("umount", target)
    _must_hold_nothing(here, daemon)
    daemon.send_signal(signal.SIGINT)
    assert daemon.wait(30) == 0
    assert here.mounts() == []
    assert here.holders() == []
    assert not here.has_daemon()


def drop_caches() -> None:
    Path("/proc/sys/vm/drop_caches").write_text("3")


def _kill(here: Instance, daemon: subprocess.Popen[bytes]) -> subprocess.Popen[bytes]:
    daemon.kill()
    daemon.wait()
    return here.start()


def _must_hold_nothing(here: Instance, daemon: subprocess.Popen[bytes]) -> None:
    """Of any image: neither views nor data; and no connections without end."""
    layers = f"{here.root}/layers/"
    becomes(lambda: shown_in(here), [])
    becomes(lambda: [f for f in footprint(daemon.pid).files if f.startswith(layers)], [])
    assert footprint(daemon.pid).other <= SOCKETS


class _Mounting:
    """Mounts one image after the other, starts a container on it, and takes it down.

    Of what is asked for while the daemon is killed, nobody knows whether it was done.
    """

    def __init__(self, here: Instance, way: Gateway, load: Load) -> None:
        self._places = Places(here.root, here.state)
        self._way = way
        self._load = load
        self._target = here.directory("other")
        self._turn = 0

    def __call__(self) -> str | None:
        name = OTHERS[self._turn % len(OTHERS)]
        mode = ("erofs", "fuse", "auto")[self._turn % 3]
        self._turn += 1
        request = protocol.MountRequest(
            reference=self._way.reference(name), target=str(self._target), mode=mode
        )
        self._ask(request)
        if mount_at(self._target) is None:
            return None
        problem = self._load.start_one(self._target)
        while mount_at(self._target) is not None:
            self._ask(protocol.UmountRequest(str(self._target)))
        return problem

    def _ask(self, request: protocol.Request) -> None:
        try:
            if client.ask(self._places, request, start=None) is None:
                time.sleep(0.05)
        except FirstByteError:
            time.sleep(0.05)
