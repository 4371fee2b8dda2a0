"""Real containerd, run beside any other on the machine: 1.6 of Debian bookworm, which is this
machine's, and 2.1 of Debian sid in a root of its own.

Everything that one has is below a temporary directory, or bears its name. Only the sockets of its
shims are elsewhere: in /run/containerd/s, whose name is built into them.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import grpc

from snapshotter.mounts.table import parse_mountinfo
from tests.support.cri import Cri
from tests.support.debian_root import entered
from tests.support.instance import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

Version = Literal["1.6", "2.1"]

_START_SECONDS = 30.0
_END_SECONDS = 20.0
_POLL_SECONDS = 0.02
_LAST_LINES = 40

_UNUSED = ("aufs", "blockfile", "btrfs", "devmapper", "erofs", "zfs")  # snapshotters


@dataclass(frozen=True, slots=True)
class Setup:
    """What is configured.

    The proxy plugin "firstbyte" is there if `proxy` is the socket of a snapshotter. `snapshotter`
    is that of the CRI. containerd 2.1 pulls through its transfer service unless `local_pull`;
    1.6 has none. Images are told to the snapshotter either way.
    """

    sandbox_image: str
    snapshotter: Literal["overlayfs", "firstbyte"] = "overlayfs"
    proxy: Path | None = None
    proxy_root: Path | None = None  # where the proxy plugin says that its data lies
    local_pull: bool = False


class RunningContainerd:
    """One containerd. `hosts` is its registry configuration: a directory with a hosts.toml each.

    `prefix` goes before commands that are to see the files and mounts it sees, of which `mounts_of`
    is a process that lives as long.
    """

    def __init__(
        self, base: Path, version: Version, setup: Setup, prefix: tuple[str, ...], mounts_of: int
    ) -> None:
        self.base = base
        self.version = version
        self.root = base / "root"
        self.state = base / "state"
        self.socket = base / "containerd.sock"
        self.hosts = base / "hosts"
        self._prefix = prefix
        self._mounts_of = mounts_of
        self._config = base / "config.toml"
        self._log = base / "containerd.log"
        self._process: subprocess.Popen[bytes] | None = None
        for directory in (self.hosts, base / "tmp"):
            directory.mkdir()
        describe = _version_2 if version == "1.6" else _version_3
        self._config.write_text(describe(self, setup))
        self.cri = Cri(self.socket, logs=base / "logs", cgroup=f"/{base.name}")

    def start(self) -> None:
        """Start it; it answers when this returns."""
        with self._log.open("ab") as output:
            self._process = subprocess.Popen(
                [*self._prefix, "containerd", "--config", self._config],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "TMPDIR": str(self.base / "tmp")},
            )
        deadline = time.monotonic() + _START_SECONDS
        while not self._answers():
            ended = self._process.poll() is not None
            assert not ended, f"containerd {self.version} has ended: {self.log()}"
            assert time.monotonic() < deadline, f"it did not start: {self.log()}"
            time.sleep(_POLL_SECONDS)

    def _answers(self) -> bool:
        if not self.socket.exists():
            return False
        try:
            self.cri.images()
            self.cri.containers()
        except grpc.RpcError:
            return False
        return True

    def stop(self) -> None:
        """End it as an administrator does. Containers go on."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """End it as a crash does. Containers go on."""
        self._end(signal.SIGKILL)

    def restart(self) -> None:
        self.stop()
        self.start()

    def _end(self, number: signal.Signals) -> None:
        if self._process is None:
            return
        self._process.send_signal(number)
        try:
            self._process.wait(_END_SECONDS)
        finally:
            self._process.kill()
            self._process.wait(_END_SECONDS)
            self._process = None
            # Of a killed one it is left, and would look like that of the next.
            self.socket.unlink(missing_ok=True)

    def ctr(self, *arguments: str | Path, namespace: str = "k8s.io") -> str:
        """What `ctr` prints; it must succeed. The default is the CRI's namespace."""
        done = subprocess.run(
            [*self._prefix, "ctr", "--address", self.socket, "--namespace", namespace, *arguments],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr + self.log()
        return done.stdout

    def log(self) -> str:
        """The last lines of its log."""
        if not self._log.exists():  # it was closed
            return ""
        lines = self._log.read_text(errors="replace").splitlines()
        return "\n".join(lines[-_LAST_LINES:])

    def mounts(self) -> list[Path]:
        """The mount points that it has below its directory, those mounted last first."""
        table = parse_mountinfo(Path(f"/proc/{self._mounts_of}/mountinfo").read_bytes())
        points = [Path(os.fsdecode(entry.point)) for entry in table]
        return [point for point in points[::-1] if self.base in point.parents]

    def processes(self) -> list[int]:
        """Its shims and all that runs in containers."""
        parents = _parents()
        found = {pid for pid in parents if self._is_shim(pid)}
        while more := {pid for pid, parent in parents.items() if parent in found} - found:
            found |= more
        return sorted(found)

    def _is_shim(self, pid: int) -> bool:
        with suppress(OSError):  # it has just ended
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            return b"shim" in words[0] and os.fsencode(self.socket) in words
        return False

    def cgroups(self) -> list[Path]:
        """Those of its pods, lower ones first, in all hierarchies."""
        found: list[Path] = []
        for top in Path("/sys/fs/cgroup").glob(f"*/{self.base.name}"):
            found += [Path(path) for path, _, _ in os.walk(top, topdown=False)]
        return found

    def close(self) -> None:
        """End it with all its containers, and remove what they leave."""
        try:
            self.stop()
        finally:
            self.cri.close()
            wait_until(self._containers_ended)
            for address in self.state.glob("io.containerd.runtime.v2.task/*/*/address"):
                Path(address.read_text().removeprefix("unix://")).unlink(missing_ok=True)
            if points := self.mounts():
                subprocess.run([*self._prefix, "umount", "--lazy", *points], check=True)
            wait_until(self._cgroups_removed)

    def _containers_ended(self) -> bool:
        for pid in (found := self.processes()):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return not found

    def _cgroups_removed(self) -> bool:
        for cgroup in (found := self.cgroups()):
            with suppress(OSError):  # the last process is ending
                cgroup.rmdir()
        return not found


@contextmanager
def running_containerd(
    version: Version, setup: Setup, *, binds: Sequence[Path] = ()
) -> Iterator[RunningContainerd]:
    """Run containerd for as long as the block runs; afterwards nothing of it is left.

    `binds` are directories that it must see, with what others mount there meanwhile: those of the
    snapshotter.
    """
    with ExitStack() as stack:
        base = Path(tempfile.mkdtemp(prefix="fb-cd-"))  # short: sockets need that
        stack.callback(shutil.rmtree, base)
        prefix: tuple[str, ...] = ()
        mounts_of = os.getpid()
        if version == "2.1":
            root = stack.enter_context(entered("sid", [base, *binds]))
            prefix, mounts_of = root.prefix, root.pid
        made = RunningContainerd(base, version, setup, prefix, mounts_of)
        stack.callback(made.close)
        made.start()
        yield made


def _parents() -> dict[int, int]:
    """The parent of every process."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has just ended
            # "PID (NAME) STATE PARENT …", where the name may hold anything
            found[int(entry.parent.name)] = int(entry.read_text().rpartition(")")[2].split()[1])
    return found


def _version_2(containerd: RunningContainerd, setup: Setup) -> str:
    """The configuration of containerd 1.6."""
    cri = 'plugins."io.containerd.grpc.v1.cri"'
    return f"""
version = 2
{_common(containerd, setup)}
[{cri}]
sandbox_image = {_text(setup.sandbox_image)}
restrict_oom_score_adj = true
[{cri}.cni]
{_cni(containerd)}
[{cri}.registry]
config_path = {_text(containerd.hosts)}
[{cri}.containerd]
snapshotter = {_text(setup.snapshotter)}
disable_snapshot_annotations = false
[{cri}.containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
[{cri}.containerd.runtimes.runc.options]
{_runc(containerd)}
"""


def _version_3(containerd: RunningContainerd, setup: Setup) -> str:
    """The configuration of containerd 2.1."""
    images = 'plugins."io.containerd.cri.v1.images"'
    runtime = 'plugins."io.containerd.cri.v1.runtime"'
    transfer = 'plugins."io.containerd.transfer.v1.local"'
    # Not to disable the annotations would have the images pulled locally.
    pull = ("use_local_image_pull = true", "disable_snapshot_annotations = false")
    return f"""
version = 3
{_common(containerd, setup)}
[plugins."io.containerd.nri.v1.nri"]
disable = true
[{images}]
snapshotter = {_text(setup.snapshotter)}
{chr(10).join(pull) if setup.local_pull else ""}
[{images}.pinned_images]
sandbox = {_text(setup.sandbox_image)}
[{images}.registry]
config_path = {_text(containerd.hosts)}
[[{transfer}.unpack_config]]
platform = "linux"
snapshotter = {_text(setup.snapshotter)}
[{runtime}]
restrict_oom_score_adj = true
[{runtime}.cni]
{_cni(containerd)}
[{runtime}.containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
[{runtime}.containerd.runtimes.runc.options]
{_runc(containerd)}
"""


def _common(containerd: RunningContainerd, setup: Setup) -> str:
    unused = [f"io.containerd.snapshotter.v1.{name}" for name in _UNUSED]
    text = f"""
root = {_text(containerd.root)}
state = {_text(containerd.state)}
disabled_plugins = {json.dumps(unused)}
[grpc]
address = {_text(containerd.socket)}
[plugins."io.containerd.internal.v1.opt"]
path = {_text(containerd.base / "opt")}
"""
    if setup.proxy:
        text += f"""
[proxy_plugins.firstbyte]
type = "snapshot"
address = {_text(setup.proxy)}
[proxy_plugins.firstbyte.exports]
enable_remote_snapshot_annotations = "true"
"""
        if setup.proxy_root:
            text += f"root = {_text(setup.proxy_root)}\n"
    return text


def _cni(containerd: RunningContainerd) -> str:
    """No network: pods are in the host's."""
    return f"conf_dir = {_text(containerd.base / 'cni')}"


def _runc(containerd: RunningContainerd) -> str:
    return f"Root = {_text(containerd.base / 'runc')}"


def _text(value: str | Path) -> str:
    """A TOML string: JSON's are, too."""
    return json.dumps(str(value))
