"""Containers that read all the time, each process in another way, and say what they have seen.

Their image has programs of this machine, Python among them, a file with fio's verification headers,
small files with their checksums, and a large file whose content tells its place.
"""

from __future__ import annotations

import hashlib
import os
import random
import re
import shutil
import subprocess
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from isal import igzip

from snapshotter.demo.container import Container
from snapshotter.demo.interruption import Interruption
from snapshotter.demo.workspace import Workspace
from snapshotter.registry.manifest import RunConfig
from tests.support.instance import firstbyte
from tests.support.layouts import raw_digest, write_packed
from tests.support.registry import RunningRegistry, skopeo_push
from tests.support.rootfs import as_layer
from tests.support.tars import file, tar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

_TOOLS = ("cat", "env", "find", "fio", "sh", "sha256sum", "sleep", "wc")
_PYTHON = Path("/usr/bin/python3")
_LIBRARY = re.compile(r"(/\S+) \(0x")
_LEFT_OUT = shutil.ignore_patterns(
    "__pycache__", "config-*", "dist-packages", "ensurepip", "idlelib", "lib2to3", "test", "tkinter"
)
_GZIP = "application/vnd.oci.image.layer.v1.tar+gzip"

_SMALL = 300  # files
_BLOCK = 4096
_BLOCKS = 4096  # of the large file
_OWN = 4 << 20
_FIO_MIB = 8
_END_SECONDS = 600.0  # bounds a failure: some wait for a slow registry, on a busy machine
_PAUSE = 0.1  # seconds between two rounds: else daemons have to wait for a processor

_LOOP = """\
#!/bin/sh
# loop NAME COMMAND...: once, and until there is /stop
name=$1 rounds=0
shift
while [ $rounds = 0 ] || [ ! -e /stop ]; do
    [ $rounds = 0 ] || sleep {pause}
    said=$("$@" 2>&1) || { echo "problem $name: $? $said"; break; }
    rounds=$((rounds + 1))
done
echo "rounds $name $rounds"
"""

_ALL = """\
#!/bin/sh
sh /load/loop sums sh -c "cd /data && sha256sum --check --quiet sums" &
sh /load/loop find sh /load/find &
sh /load/loop python python3 -B -I /load/imports.py &
sh /load/loop fio fio --name=verify --filename=/data/fio --readonly --rw=randread --bs=4k \
    --size={size}m --verify=crc32c --verify_fatal=1 --ioengine=psync --minimal &
python3 -B -I /load/probe.py &
wait
echo "ended"
"""

_FIND = """\
found=$(find /usr /lib /data /load ! -type d | wc -l)
[ "$found" = {files} ] || { echo "$found files"; exit 1; }
"""

_IMPORTS = """\
import argparse, asyncio, ctypes, dataclasses, decimal, email.message, http.client, json, logging
import sqlite3, unittest, xml.dom.minidom
assert json.loads("[1]") == [1]
assert decimal.Decimal("0.1") * 3 == decimal.Decimal("0.3")
"""

_PROBE = """\
import os, random, time
BLOCK, BLOCKS = {block}, {blocks}
descriptor = os.open("/data/large", os.O_RDONLY)
os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
longest, rounds = 0.0, 0
while not rounds or not os.path.exists("/stop"):
    number = random.randrange(BLOCKS)
    began = time.monotonic()
    data = os.pread(descriptor, BLOCK, number * BLOCK)
    longest = max(longest, time.monotonic() - began)
    if data != random.Random(number).randbytes(BLOCK):
        print("problem probe: wrong bytes in block", number, flush=True)
    os.posix_fadvise(descriptor, number * BLOCK, BLOCK, os.POSIX_FADV_DONTNEED)
    rounds += 1
    time.sleep(0.002)
print("stall", longest, flush=True)
print("rounds probe", rounds, flush=True)
"""

_FRESH = """\
set -e
cd /data
sha256sum --check --quiet sums
[ ! -e /own ] || sha256sum --check --quiet /own.sum
python3 -B -I /load/imports.py
echo right
"""

ALL = ("/bin/sh", "/load/all")
"""The command of a container that reads in all ways until there is a file /stop."""

FRESH = ("/bin/sh", "/load/fresh")
"""The command of a container that reads once, and says that all was right."""

RIGHT = "right"


def push_workload(registry: RunningRegistry, directory: Path, *names: str) -> None:
    """Push the image, and under each of the names a variant with a large file of its own on top.

    All have file indexes.
    """
    root = directory / "root"
    _fill(root)
    tools = _packed(as_layer(root))
    for name in ("workload", *names):
        layers = [tools]
        if name != "workload":
            layers.append(_packed(_own(name)))
        config = {"config": {"Env": ["PATH=/bin"], "Cmd": FRESH}}
        write_packed(directory / name, layers, _GZIP, config=config)
        skopeo_push(directory / name, registry.reference(name))
        firstbyte("index", "build", registry.reference(name), "--push")


def _own(name: str) -> bytes:
    content = random.Random(name).randbytes(_OWN)
    check = f"{hashlib.sha256(content).hexdigest()}  /own\n".encode()
    return tar(file(b"own", content), file(b"own.sum", check))


def _fill(root: Path) -> None:
    (root / "bin").mkdir(parents=True)
    (root / "data").mkdir()
    (root / "load").mkdir()
    for tool in _TOOLS:
        found = shutil.which(tool)
        assert found
        _copy_program(Path(found), root / "bin" / tool, root)
    _copy_program(_PYTHON.resolve(), root / "bin" / "python3", root)
    library = _PYTHON.resolve().name  # python3.11
    shutil.copytree(f"/usr/lib/{library}", root / "usr/lib" / library, ignore=_LEFT_OUT)
    _copy_libraries(root, *(root / "usr/lib" / library / "lib-dynload").iterdir())
    for name in ("dev", "etc", "proc", "root", "sys", "tmp"):
        (root / name).mkdir()
    (root / "etc/passwd").write_text("root:x:0:0::/root:/bin/sh\n")
    _fill_data(root / "data")
    programs = {"imports.py": _IMPORTS, "fresh": _FRESH}
    programs["loop"] = _LOOP.replace("{pause}", str(_PAUSE))
    programs["all"] = _ALL.format(size=_FIO_MIB)
    programs["probe.py"] = _PROBE.format(block=_BLOCK, blocks=_BLOCKS)
    for name, text in programs.items():
        (root / "load" / name).write_text(text)
    found_files = 1 + sum(
        len(names)
        for place in ("usr", "lib", "data", "load")
        for _, _, names in os.walk(root / place)
    )
    (root / "load/find").write_text(_FIND.replace("{files}", str(found_files)))


def _fill_data(data: Path) -> None:
    source = random.Random(3)
    sums = []
    for number in range(_SMALL):
        content = source.randbytes(source.randrange(20_000))
        (data / f"small{number}").write_bytes(content)
        sums.append(f"{hashlib.sha256(content).hexdigest()}  small{number}\n")
    (data / "sums").write_text("".join(sums))
    with (data / "large").open("wb") as file:
        for number in range(_BLOCKS):
            file.write(random.Random(number).randbytes(_BLOCK))
    write = ["fio", "--name=write", f"--filename={data / 'fio'}", "--rw=write", "--bs=4k"]
    write += [f"--size={_FIO_MIB}m", "--verify=crc32c", "--do_verify=0", "--ioengine=psync"]
    write += ["--verify_state_save=0"]
    subprocess.run(write, check=True, capture_output=True)


def _copy_program(program: Path, copy: Path, root: Path) -> None:
    shutil.copy(program, copy)
    _copy_libraries(root, program)


def _copy_libraries(root: Path, *programs: Path) -> None:
    listed = subprocess.run(["ldd", *programs], capture_output=True, text=True, check=False).stdout
    for library in _LIBRARY.findall(listed):
        copy = root / library[1:]
        if not copy.exists():
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(library, copy)


def _packed(raw: bytes) -> tuple[bytes, str]:
    return igzip.compress(raw, 1), raw_digest([raw])  # zlib takes 10 s


@dataclass
class Seen:
    """What containers and their starters have seen. `longest` is the slowest single read of 4 KiB
    in seconds, `rounds` counts what went well, by kind."""

    problems: list[str] = field(default_factory=list)
    rounds: dict[str, int] = field(default_factory=dict)
    longest: float = 0.0

    def read(self, lines: list[str]) -> None:
        """Take in what a container printed."""
        for line in lines:
            word, _, rest = line.partition(" ")
            if word == "rounds":
                name, _, count = rest.partition(" ")
                self.add(name, int(count))
            elif word == "stall":
                self.longest = max(self.longest, float(rest))
            elif word != "ended":
                self.problems.append(line)

    def add(self, name: str, count: int = 1) -> None:
        self.rounds[name] = self.rounds.get(name, 0) + count


class Load:
    """Containers on mounted images, run by runc, and threads that start more of them."""

    def __init__(self, workspace: Workspace) -> None:
        self.seen = Seen()
        self._workspace = workspace
        self._readers: list[tuple[str, Container]] = []
        self._threads: list[threading.Thread] = []
        self._over = threading.Event()
        self._given_up = threading.Event()
        self._names = iter(range(1 << 30))

    def read(self, lower: Path) -> None:
        """Start a container that reads in all ways, until the end."""
        name = f"reader{next(self._names)}"
        container = Container(self._workspace, name, lower)
        container.start(_run(ALL), {})
        self._readers.append((name, container))

    def start_fresh(self, lower: Path) -> None:
        """Start one container after the other, each of which must end well, until the end."""
        self.repeat("fresh starts", lambda: self.start_one(lower))

    def repeat(self, name: str, action: Callable[[], str | None]) -> None:
        """Do something in a thread until the end, once at least; it says what went wrong, nothing
        if all was well, and is None if it was not done."""

        def work() -> None:
            done = False
            while not self._given_up.is_set() and not (done and self._over.is_set()):
                problem = action()
                done = done or problem is not None
                if problem:
                    self.seen.problems.append(f"{name}: {problem}")
                elif problem is not None:
                    self.seen.add(name)
                self._over.wait(_PAUSE)

        thread = threading.Thread(target=work)
        self._threads.append(thread)
        thread.start()

    def start_one(self, lower: Path) -> str:
        """Start a container and wait for its end; what went wrong."""
        container = Container(self._workspace, f"fresh{next(self._names)}", lower)
        container.start(_run(FRESH), {})
        try:
            wait_ended(container)
            said = container.output.last(5)
            ended = container.exit_status()
        finally:
            container.stop()
        return "" if (ended, said) == (0, RIGHT) else f"{ended}: {said}"

    def give_up(self) -> None:
        """Do nothing more, whatever has not been done."""
        self._given_up.set()
        for thread in self._threads:
            thread.join()

    def end(self) -> Seen:
        """End all of it, and tell what was seen."""
        for name, _ in self._readers:
            (self._workspace.path / name / "bundle/rootfs/stop").touch()
        self._over.set()
        for thread in self._threads:
            thread.join()
        for name, container in self._readers:
            wait_ended(container)
            lines = container.output.last(1000).splitlines()
            self.seen.read(lines)
            if "ended" not in lines:
                self.seen.problems.append(f"{name} has not come to its end: {lines[-5:]}")
            container.stop()
        return self.seen


def _run(command: Sequence[str]) -> RunConfig:
    return RunConfig(entrypoint=list(command), env=["PATH=/bin"])


def wait_ended(container: Container) -> None:
    """Wait until what runs in a container has ended by itself."""
    deadline = time.monotonic() + _END_SECONDS
    while container.exit_status() is None:
        assert time.monotonic() < deadline, f"it goes on: {container.output.last(20)}"
        time.sleep(0.02)


@contextmanager
def running_load() -> Iterator[Load]:
    """A load; at the end of the block all of its containers and mounts are gone."""
    warnings: list[str] = []
    with Interruption() as interruption, Workspace(interruption, warnings.append) as workspace:
        load = Load(workspace)
        try:
            yield load
        finally:
            load.give_up()
    assert warnings == []
