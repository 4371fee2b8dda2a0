"""Nothing that happens to the daemon happens to who reads its mounts."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.instance import Instance, firstbyte, wait_until
from tests.support.layouts import write_layout
from tests.support.registry import RunningRegistry, skopeo_push
from tests.support.tars import directory, file, tar

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.root

KILLS = int(os.environ.get("FIRSTBYTE_KILLS", "10"))
"""In each test; the environment variable is for those who want more."""

BIG = 24 << 20
FILES = 400
MODULE = b"VALUE = 42\n"
PAUSE = 0.05  # seconds between two rounds of a reader: else daemons wait for a processor


@pytest.fixture(scope="module")
def image(registry: RunningRegistry, tmp_path_factory: pytest.TempPathFactory) -> str:
    """An image with a big file, many small ones with their checksums, and a Python package."""
    source = random.Random(3)
    small = {b"small/%03d" % n: source.randbytes(source.randrange(20_000)) for n in range(FILES)}
    sums = b"".join(
        b"%s  %s\n" % (hashlib.sha256(data).hexdigest().encode(), name)
        for name, data in small.items()
    )
    lower = tar(directory(b"small"), *[file(name, data) for name, data in small.items()])
    upper = tar(
        file(b"sums", sums),
        file(b"big", big()),
        directory(b"lib"),
        directory(b"lib/package"),
        *[file(b"lib/package/%s.py" % name, MODULE) for name in (b"__init__", b"a", b"b")],
    )
    layout = tmp_path_factory.mktemp("survival") / "layout"
    write_layout(layout, [lower, upper])
    reference = registry.reference("survival")
    skopeo_push(layout, reference)
    firstbyte("index", "build", reference, "--push")
    return reference


def big() -> bytes:
    return random.Random(4).randbytes(BIG)


class Load:
    """Readers of a mounted tree, each over and over until `stop`. `problems` is what they saw."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.rounds = 0
        self.longest = 0.0
        self._over = threading.Event()
        self._threads: list[threading.Thread] = []

    def on(self, root: Path) -> None:
        """Start all kinds of readers of `root`."""
        for read in (_sums, _find, _import, _random_ranges):
            thread = threading.Thread(target=self._repeat, args=(read, root))
            self._threads.append(thread)
            thread.start()

    def stop(self) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def _repeat(self, read: Callable[[Path], str], root: Path) -> None:
        while not self._over.is_set():
            began = time.monotonic()
            try:
                problem = read(root)
            except OSError as error:
                problem = repr(error)
            if problem:
                self.problems.append(f"{read.__name__} of {root.name}: {problem}")
            self.longest = max(self.longest, time.monotonic() - began)
            self.rounds += 1
            self._over.wait(PAUSE)


def _run(*command: str | Path, root: Path) -> str:
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    return "" if done.returncode == 0 else f"{done.returncode}: {done.stderr[-300:]}"


def _sums(root: Path) -> str:
    return _run("sha256sum", "--check", "--quiet", "sums", root=root)


def _find(root: Path) -> str:
    found = sum(len(names) for _, _, names in os.walk(root, onerror=_raise))
    return "" if found == FILES + 5 else f"{found} files"


def _raise(error: OSError) -> None:
    raise error


def _import(root: Path) -> str:
    program = "import sys; sys.path[0] = 'lib'; from package import a, b; a.VALUE + b.VALUE"
    return _run(sys.executable, "-I", "-S", "-B", "-c", program, root=root)


def _random_ranges(root: Path, expected: bytes = big()) -> str:
    source = random.Random()
    descriptor = os.open(root / "big", os.O_RDONLY)
    try:
        for _ in range(20):
            offset = source.randrange(BIG)
            size = source.randrange(1, 200_000)
            if os.pread(descriptor, size, offset) != expected[offset : offset + size]:
                return f"wrong bytes at {offset}"
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
    return ""


def kill(here: Instance, process: subprocess.Popen[bytes]) -> subprocess.Popen[bytes]:
    """Kill the daemon and start another one."""
    process.kill()
    process.wait()
    return here.start()


def drop_caches() -> None:
    Path("/proc/sys/vm/drop_caches").write_text("3")


def test_readers_see_nothing_of_a_daemon_that_is_killed_again_and_again(
    here: Instance, image: str
) -> None:
    """While all of the image comes, and after; in both modes that need the daemon."""
    source = random.Random(5)
    process = here.start()
    load = Load()
    targets = [here.directory(mode) for mode in ("fuse", "erofs")]
    for target in targets:
        here.succeed("mount", image, target, "--mode", target.name)
    with ExitStack() as stack:
        stack.callback(load.stop)
        for target in targets:
            load.on(target)
        for _ in range(KILLS):
            time.sleep(source.uniform(0, 0.3))
            drop_caches()
            process = kill(here, process)
    print(f"{KILLS} kills, {load.rounds} rounds of readers, the longest {load.longest:.2f} s")
    assert load.problems == []
    for target in targets:
        here.succeed("umount", target)
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 0
    assert here.mounts() == []
    assert here.holders() == []


def test_readers_see_nothing_of_an_upgrade(here: Instance, image: str) -> None:
    process = here.start()
    load = Load()
    targets = [here.directory(mode) for mode in ("fuse", "erofs")]
    for target in targets:
        here.succeed("mount", image, target, "--mode", target.name)
    with ExitStack() as stack:
        stack.callback(load.stop)
        for target in targets:
            load.on(target)
        for _ in range(5):
            drop_caches()
            successor = here.start("--replace")
            assert process.wait(30) == 0
            process = successor
    print(f"upgrades: {load.rounds} rounds of readers, the longest {load.longest:.2f} s")
    assert load.problems == []


def test_a_partly_local_image_goes_on_without_its_registry(
    here: Instance, image: str, registry: RunningRegistry
) -> None:
    """What is on the node is read, over a kill, although nobody can be asked for more."""
    process = here.start()
    target = here.directory("erofs")
    here.succeed("mount", image, target, "--mode", "erofs", "--wait-local")
    os.kill(registry.pid, signal.SIGSTOP)
    try:
        process = kill(here, process)
        drop_caches()
        assert _sums(target) == ""
        assert _find(target) == ""
    finally:
        os.kill(registry.pid, signal.SIGCONT)


def test_native_mounts_need_no_daemon(here: Instance, image: str) -> None:
    process = here.start()
    target = here.directory("native")
    here.succeed("mount", image, target, "--mode", "native")
    process.kill()
    process.wait()
    for holder in here.holders():
        os.kill(holder, signal.SIGKILL)
    drop_caches()
    assert (_sums(target), _find(target), _import(target)) == ("", "", "")
    assert _random_ranges(target) == ""
    here.start()
    here.succeed("umount", target)
    wait_until(lambda: not [entry for entry in here.mounts() if b"native" in entry.point])
