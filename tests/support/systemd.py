"""A real systemd, as process 1 of namespaces of its own, to run units under.

It sees this machine's files, but has its own /run, mounts, processes and control groups, and knows
no units but those it is given and the targets that all units want.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from snapshotter.mounts.table import read_mounts
from tests.support.instance import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_SECONDS = 60
_TARGETS = ("sysinit", "basic", "shutdown", "multi-user")

# $1 is a directory with the units and the console, the others are pairs: DIRECTORY PLACE.
_INIT = """\
set -e
mount --make-rprivate /
base=$1
shift
while [ $# -gt 0 ]; do mount --bind "$1" "$2"; shift 2; done
mount -t proc proc /proc
mount -t tmpfs tmpfs /run
mkdir /run/units
cp -r "$base"/units/. /run/units
mount --bind "$base/console" /dev/console
umount -R /sys/fs/cgroup
mount -t cgroup2 cgroup2 /sys/fs/cgroup
export container=test SYSTEMD_UNIT_PATH=/run/units
exec /lib/systemd/systemd --system --unit=multi-user.target --log-target=console --show-status=no
"""


class Systemd:
    """A running one; `pid` is its process as seen from here."""

    def __init__(self, pid: int, base: Path) -> None:
        self.pid = pid
        self._base = base

    def run(self, *command: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a program where the units run."""
        done = subprocess.run(
            ["nsenter", f"--target={self.pid}", "--mount", "--pid", *map(str, command)],
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            check=False,
        )
        assert not check or done.returncode == 0, done.stderr + self.console()
        return done

    def show(self, unit: str, name: str) -> str:
        """A property of a unit."""
        return self.run("systemctl", "show", unit, f"--property={name}", "--value").stdout.strip()

    def console(self) -> str:
        """What systemd has to say."""
        return (self._base / "console").read_text(errors="replace")


@contextmanager
def systemd(units: Mapping[str, str], binds: Mapping[Path, str]) -> Iterator[Systemd]:
    """Start one with these units, by file name, and `binds` shown at other places."""
    group = unified_group() / f"firstbyte-test-{os.getpid()}"
    group.mkdir()
    base = Path(tempfile.mkdtemp(prefix="fb-systemd-"))
    try:
        (base / "console").touch()
        targets = {f"{name}.target": "[Unit]\n" for name in _TARGETS}
        for name, text in (targets | dict(units)).items():
            path = base / "units" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        pairs = [str(word) for pair in binds.items() for word in pair]
        command = f'echo 0 > "{group}/cgroup.procs" && exec "$@"'
        namespaces = ["unshare", "-C", "-m", "-u", "-i", "-p", "--fork", "--kill-child"]
        with subprocess.Popen(
            ["sh", "-c", command, "-", *namespaces, "sh", "-c", _INIT, "-", base, *pairs]
        ) as outer:
            try:
                yield _booted(outer, base)
            finally:
                outer.send_signal(signal.SIGKILL)  # and so all in there
    finally:
        wait_until(lambda: remove_group(group))
        shutil.rmtree(base)


def _booted(outer: subprocess.Popen[bytes], base: Path) -> Systemd:
    children = Path(f"/proc/{outer.pid}/task/{outer.pid}/children")
    wait_until(lambda: children.read_text().split())
    started = Systemd(int(children.read_text().split()[0]), base)
    asking = ("systemctl", "is-active", "multi-user.target")
    wait_until(lambda: started.run(*asking, check=False).returncode == 0)
    return started


def unified_group() -> Path:
    found = [entry.point for entry in read_mounts() if entry.kind == b"cgroup2"]
    return Path(os.fsdecode(found[0]))


def remove_group(group: Path) -> bool:
    """Remove a control group and those in it, when their processes have ended."""
    try:
        for folder, _, _ in os.walk(group, topdown=False):
            Path(folder).rmdir()
    except OSError:
        return False
    return True
