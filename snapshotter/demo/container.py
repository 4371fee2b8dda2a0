"""A container on a root file system, run by runc: the least that container runtimes do.

Source: OCI runtime-spec (config.md, config-linux.md); the defaults are those of containerd's
`ctr run --net-host` where the image does not say.
"""

from __future__ import annotations

import contextlib
import json
import signal
from pathlib import Path
from typing import TYPE_CHECKING

from snapshotter.demo.accounts import find_user
from snapshotter.demo.cgroups import remove_cgroups
from snapshotter.demo.errors import DemoError
from snapshotter.demo.foreground import ForegroundContainer
from snapshotter.demo.workspace import stop_group
from snapshotter.mounts.errors import MountPointError
from snapshotter.mounts.syscalls import MountFlag, mount, unmount

if TYPE_CHECKING:
    from collections.abc import Mapping

    from snapshotter.demo.workspace import Workspace
    from snapshotter.registry.manifest import RunConfig

_RUNC_SECONDS = 20.0  # for runc to kill or delete

_PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

# Numbers of capabilities in linux/capability.h, of those that containers get by default.
_CAPABILITIES = {
    "CAP_CHOWN": 0,
    "CAP_DAC_OVERRIDE": 1,
    "CAP_FOWNER": 3,
    "CAP_FSETID": 4,
    "CAP_KILL": 5,
    "CAP_SETGID": 6,
    "CAP_SETUID": 7,
    "CAP_SETPCAP": 8,
    "CAP_NET_BIND_SERVICE": 10,
    "CAP_NET_RAW": 13,
    "CAP_SYS_CHROOT": 18,
    "CAP_MKNOD": 27,
    "CAP_AUDIT_WRITE": 29,
    "CAP_SETFCAP": 31,
}

_MOUNTS = (
    ("/proc", "proc", "proc", ["nosuid", "noexec", "nodev"]),
    ("/dev", "tmpfs", "tmpfs", ["nosuid", "strictatime", "mode=755", "size=65536k"]),
    ("/dev/pts", "devpts", "devpts", ["nosuid", "noexec", "newinstance", "ptmxmode=0666"]),
    ("/dev/shm", "tmpfs", "shm", ["nosuid", "noexec", "nodev", "mode=1777"]),  # noqa: S108
    ("/dev/mqueue", "mqueue", "mqueue", ["nosuid", "noexec", "nodev"]),
    ("/sys", "sysfs", "sysfs", ["nosuid", "noexec", "nodev", "ro"]),
    # Of the machine, whose network the container uses.
    ("/etc/resolv.conf", "bind", "/etc/resolv.conf", ["rbind", "ro"]),
    ("/etc/hosts", "bind", "/etc/hosts", ["rbind", "ro"]),
)


class Container(ForegroundContainer):
    """One container in the workspace, with `lower` as its read-only root file system.

    What it writes goes to an overlay in the workspace. `name` must be new in the workspace.
    """

    def __init__(self, workspace: Workspace, name: str, lower: Path) -> None:
        self._directory = workspace.directory(name)
        # Names of containers become names of cgroups, which are the machine's: as unique as the
        # workspace's directory.
        self._id = f"{workspace.path.name}-{name}"
        self._lower = lower
        super().__init__(workspace, self._directory / "pid")

    def start(self, image: RunConfig, environment: Mapping[str, str]) -> None:
        """Start the image's own command; `environment` goes before what the image sets."""
        bundle, root = self._directory / "bundle", self._directory / "bundle" / "rootfs"
        upper, work = self._directory / "upper", self._directory / "work"
        for path in (root, upper, work):
            path.mkdir(parents=True)
        self._workspace.defer(f"remove the container {self._id}", self.stop)
        options = f"lowerdir={self._lower},upperdir={upper},workdir={work}"
        mount("overlay", root, "overlay", MountFlag(0), options)
        specification = _specification(image, root, environment, cgroup=self._id)
        (bundle / "config.json").write_text(json.dumps(specification))

        run = [*self._runc("run"), "--bundle", bundle, "--pid-file", self._pid_file, self._id]
        self._launch(run)

    def stop(self) -> None:
        """Kill the workload and remove the container and its mounts; fine if nothing is there."""
        if self._process:
            # First runc itself, which may be about to make what is then removed.
            stop_group(self._process, signal.SIGKILL)
            delete = [*self._runc("delete"), "--force", self._id]
            self._workspace.run(delete, seconds=_RUNC_SECONDS)
            remove_cgroups(self._id)  # a runc killed at its very start made and did not note them
            self._process = None  # not before: a signal may end this, and then it is called again
        with contextlib.suppress(MountPointError):
            unmount(self._directory / "bundle" / "rootfs", detach=True)

    def _runc(self, command: str) -> list[str | Path]:
        return ["runc", "--root", self._workspace.directory("runc"), command]


def _specification(
    image: RunConfig, root: Path, environment: Mapping[str, str], *, cgroup: str
) -> dict[str, object]:
    arguments = [*(image.entrypoint or []), *(image.cmd or [])]
    if not arguments:
        raise DemoError("the image has no command to run", hint="choose one that starts a program")
    user = find_user(root, image.user or "")
    variables = {name: value for name, _, value in (v.partition("=") for v in image.env or [])}
    variables = {"HOME": user.home, **variables, **environment}
    variables.setdefault(*_PATH.split("=", 1))
    capabilities = _capabilities()
    return {
        "ociVersion": "1.0.2",
        "process": {
            "terminal": False,
            "user": {"uid": user.uid, "gid": user.gid, "additionalGids": list(user.groups)},
            "args": arguments,
            "env": [f"{name}={value}" for name, value in variables.items()],
            "cwd": image.working_dir or "/",
            "capabilities": {
                "bounding": capabilities,
                "permitted": capabilities,
                "effective": capabilities,
            },
            "noNewPrivileges": True,
        },
        "root": {"path": str(root), "readonly": False},
        "mounts": [
            {"destination": place, "type": kind, "source": source, "options": options}
            for place, kind, source, options in _MOUNTS
            if kind != "bind" or Path(source).exists()
        ],
        "linux": {
            "cgroupsPath": f"/{cgroup}",
            "namespaces": [{"type": kind} for kind in ("pid", "ipc", "uts", "mount")],
            # No limits: raising them needs CAP_SYS_RESOURCE, which a container host may lack.
            "resources": {"devices": [{"allow": True, "access": "rwm"}]},
            "maskedPaths": ["/proc/kcore", "/proc/keys", "/sys/firmware"],
            "readonlyPaths": ["/proc/bus", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"],
        },
    }


def _capabilities() -> list[str]:
    """The default ones, as far as this process can pass them on (proc_pid_status(5))."""
    status = Path("/proc/self/status").read_text()
    bounding = int(status.split("CapBnd:")[1].split()[0], 16)
    return [name for name, number in _CAPABILITIES.items() if bounding >> number & 1]
