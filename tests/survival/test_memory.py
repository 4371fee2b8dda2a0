"""A container that has little memory reads far more than that, in every mode."""

from __future__ import annotations

import hashlib
import os
import subprocess
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from snapshotter.mounts.table import read_mounts
from tests.support.instance import wait_until
from tests.support.layouts import write_layout
from tests.support.leaks import footprint
from tests.support.tars import file, tar

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.instance import Instance

pytestmark = pytest.mark.root

LIMIT = 64 << 20  # bytes of memory that the reader has
SIZE = int(os.environ.get("FIRSTBYTE_READ_MIB", "192")) << 20
GROWTH = 64 << 20  # bytes of memory that the daemon may take for it

BLOCK = 1 << 20


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """An image with a large file, and the file's SHA-256.

    Its bytes tell their place, and compress well: making the image is not what this is about.
    """
    content = b"".join(b"%07d\n" % number * (BLOCK // 8) for number in range(SIZE // BLOCK))
    path = tmp_path_factory.mktemp("memory")
    write_layout(path, [tar(file(b"large", content))])
    return f"oci:{path}", hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("mode", ["fuse", "erofs", "native"])
def test_a_reader_in_a_small_control_group(
    here: Instance, large: tuple[str, str], mode: str
) -> None:
    """First what is fetched meanwhile, then what is here; by read(2) and by mmap(2)."""
    image, digest = large
    daemon = here.start()
    target = here.directory("m")
    here.succeed("mount", image, target, "--mode", mode)
    before = footprint(daemon.pid).resident
    enter, name = ("sh", "-c"), str(target / "large")
    by_pages = (
        "import hashlib, mmap, sys; f = open(sys.argv[1], 'rb');"
        "print(hashlib.sha256(mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ)).hexdigest())"
    )
    with memory_group(f"firstbyte-memory-{os.getpid()}") as group:
        for command in (["sha256sum"], ["sha256sum"], ["/usr/bin/python3", "-c", by_pages]):
            done = subprocess.run(
                [*enter, f'echo $$ > "{group}/cgroup.procs" && exec "$@"', "-", *command, name],
                capture_output=True,
                text=True,
                timeout=120,
                check=False,
            )
            assert done.returncode == 0, done.stderr  # nobody was killed for want of memory
            assert done.stdout.split()[0] == digest
    assert footprint(daemon.pid).resident <= before + GROWTH
    here.succeed("umount", target)


@contextmanager
def memory_group(name: str) -> Iterator[Path]:
    """A control group of LIMIT bytes, in whichever hierarchy has the memory controller."""
    group, limit = _memory_hierarchy()
    group /= name
    group.mkdir()
    try:
        (group / limit).write_text(str(LIMIT))
        yield group
    finally:
        wait_until(lambda: _removed(group))


def _memory_hierarchy() -> tuple[Path, str]:
    """Where groups with a memory limit can be made, and the name of the limit's file."""
    for entry in read_mounts():
        point = Path(os.fsdecode(entry.point))
        if entry.kind == b"cgroup" and b"memory" in entry.super_options:
            return point, "memory.limit_in_bytes"
        if entry.kind == b"cgroup2":
            controllers = point / "cgroup.subtree_control"
            with suppress(OSError):  # another hierarchy has it
                controllers.write_text("+memory")
            if "memory" in controllers.read_text().split():
                return point, "memory.max"
    raise AssertionError("no control groups with memory limits")


def _removed(group: Path) -> bool:
    with suppress(OSError):  # its last process is ending
        group.rmdir()
    return not group.exists()
