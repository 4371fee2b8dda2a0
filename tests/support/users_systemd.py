"""A real `systemd --user` of the user without privileges, to run a unit for users under.

It has a mount namespace and control groups of its own, and knows no units but those it is given
and the targets that all units want.
"""

from __future__ import annotations

import os
import subprocess
from contextlib import contextmanager
from typing import TYPE_CHECKING

from tests.support.instance import wait_until
from tests.support.rootless import become_somebody, give_to_somebody
from tests.support.systemd import remove_group, unified_group

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from tests.support.rootless import Somebody

_SECONDS = 60
_TARGETS = ("sysinit", "basic", "shutdown")

# It looks for traces of a systemd that runs the machine, and for its own control groups.
_INIT = """\
set -e
umount -R /sys/fs/cgroup
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t tmpfs tmpfs /run
mkdir -p /run/systemd/system
exec "$@" /lib/systemd/systemd --user --unit=basic.target --log-target=console
"""


class UsersSystemd:
    """A running one."""

    def __init__(self, user: Somebody) -> None:
        self._user = user
        self._prefix = (*user.enter, *become_somebody())

    def ask(self, *words: str) -> subprocess.CompletedProcess[str]:
        """`systemctl --user`"""
        return subprocess.run(
            [*self._prefix, "systemctl", "--user", *words],
            env=self._user.environment,
            cwd="/",
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            check=False,
        )

    def do(self, *words: str) -> str:
        """The same, which has to succeed."""
        done = self.ask(*words)
        assert done.returncode == 0, done.stderr + self._user.log()
        return done.stdout.strip()

    def show(self, unit: str, name: str) -> str:
        """A property of a unit."""
        return self.do("show", unit, f"--property={name}", "--value")


@contextmanager
def users_systemd(user: Somebody, units: Mapping[str, str]) -> Iterator[UsersSystemd]:
    """Start one with these units, by file name. At the end all that it has started is killed."""
    folder = user.base / "run/units"
    folder.mkdir()
    for name, text in ({f"{one}.target": "[Unit]\n" for one in _TARGETS} | dict(units)).items():
        (folder / name).write_text(text)
    give_to_somebody(folder, *folder.iterdir())
    group = unified_group() / f"firstbyte-user-{os.getpid()}"
    group.mkdir()
    give_to_somebody(group, *(group / f"cgroup.{one}" for one in ("procs", "subtree_control")))
    namespaces = [*user.enter, "unshare", "-C", "-m"]
    join = f'echo 0 > "{group}/cgroup.procs" && exec "$@"'
    try:
        with (user.home / "systemd.log").open("wb") as console:
            process = subprocess.Popen(
                ["sh", "-c", join, "-", *namespaces, "sh", "-c", _INIT, "-", *become_somebody()],
                env=user.environment | {"SYSTEMD_UNIT_PATH": str(folder), "container": "test"},
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=console,
            )
        started = UsersSystemd(user)
        try:
            asking = ("is-active", "basic.target")
            wait_until(lambda: process.poll() or started.ask(*asking).returncode == 0)
            assert process.poll() is None, (user.home / "systemd.log").read_text()
            yield started
        finally:
            (group / "cgroup.kill").write_text("1")
            process.wait(timeout=_SECONDS)
    finally:
        wait_until(lambda: remove_group(group))
