"""Renames between directories, of which a file system does one at a time, while no daemon is there.

An overlayfs copies a file up under the lock for such renames in the file system of its upper
directory, and asks the lower one for its extended attributes meanwhile. If that is ours, everybody
who renames there waits for the next daemon; so it must not be one of them.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from snapshotter.mounts import syscalls
from snapshotter.mounts.syscalls import MountFlag
from snapshotter.mounts.table import mount_at
from tests.support.instance import Instance, wait_until
from tests.support.layouts import write_layout
from tests.support.tars import directory, tar

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.root


def test_a_daemon_starts_while_a_file_is_copied_up(here: Instance, tmp_path: Path) -> None:
    write_layout(tmp_path / "layout", [tar(directory(b"d"))])
    daemon = here.start()
    lower = here.directory("lower")
    here.succeed("mount", f"oci:{tmp_path / 'layout'}", lower, "--mode", "fuse")
    upper, work, merged, other = map(here.directory, ("upper", "work", "merged", "other"))
    (other / "file").touch()
    options = f"lowerdir={lower},upperdir={upper},workdir={work}"
    syscalls.mount("overlay", merged, "overlay", MountFlag(0), options)
    with held(merged / "d"):  # or chmod would wait for the name, if somebody drops the caches
        daemon.kill()
        daemon.wait()
        with (
            subprocess.Popen(["chmod", "700", merged / "d"]) as copying,
            ExitStack() as ended,
            failing_if_not_answered(here.state / "fs"),
        ):
            wait_until(lambda: waits_for(copying) == "request_wait_answer")
            renaming = ended.enter_context(subprocess.Popen(["mv", other / "file", upper]))
            wait_until(lambda: waits_for(renaming) == "do_renameat2")
            here.start()
            assert copying.wait(30) == renaming.wait(30) == 0
    syscalls.unmount(merged)
    assert (upper / "d").stat().st_mode & 0o777 == 0o700


@contextmanager
def held(path: Path) -> Iterator[None]:
    """The kernel keeps what it knows of a file in memory."""
    descriptor = os.open(path, os.O_PATH)
    try:
        yield
    finally:
        os.close(descriptor)


def waits_for(process: subprocess.Popen[bytes]) -> str:
    """The function of the kernel in which a process waits."""
    return Path(f"/proc/{process.pid}/wchan").read_text()


@contextmanager
def failing_if_not_answered(mount: Path) -> Iterator[None]:
    """If the block fails, so does what the FUSE mount is asked: no signal ends who waits for it, so
    this comes before anybody waits for them."""
    entry = mount_at(mount)
    assert entry is not None
    try:
        yield
    except BaseException:
        with tempfile.TemporaryDirectory() as name:
            control = Path(name)
            syscalls.mount("fusectl", control, "fusectl", MountFlag(0))
            try:
                (control / str(entry.device[1]) / "abort").write_text("1")
            finally:
                syscalls.unmount(control)
        raise
