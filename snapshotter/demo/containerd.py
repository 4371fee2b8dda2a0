"""A containerd of the demo's own: for the full pull, and to be served by FirstByte.

Its root, state, sockets and containers are in the workspace, whatever other containerd the machine
has; only the sockets of its shims are in /run/containerd/s, which is built into them, under names
of their own. The configuration is of version 2, which containerd 1.6 and all later ones read.

Sources: containerd's docs/man/containerd-config.toml.5.md, docs/cri/config.md and, for shims,
runtime/v2/README.md.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

from snapshotter.demo.cgroups import remove_cgroups
from snapshotter.demo.cri import ImageService
from snapshotter.demo.errors import DemoError
from snapshotter.demo.workspace import marked_processes, stop_group

if TYPE_CHECKING:
    from snapshotter.demo.workspace import Workspace

_READY_SECONDS = 30.0
_COMMAND_SECONDS = 20.0
_PULL_SECONDS = 3600.0
_POLL_SECONDS = 0.05

_PROXY = "firstbyte"
_DEFAULT = "overlayfs"
_NAMESPACE = "k8s.io"  # the CRI's

_SHIM_SOCKETS = "/run/containerd/s/"

# `disable_snapshot_annotations`: the labels that tell a snapshotter the image. From containerd 2.1
# on this pulls as 1.6 does and not through the transfer service; the same with either snapshotter.
# Without a table of `runtimes` containerd 2 would not take these settings over.
# An empty `config_path` and `conf_dir` are no mirrors and no network of the machine's.
_CONFIGURATION = """\
version = 2
root = {root}
state = {state}
disabled_plugins = [
  "io.containerd.internal.v1.opt",
  "io.containerd.internal.v1.tracing",
  "io.containerd.nri.v1.nri",
  "io.containerd.tracing.processor.v1.otlp",
]

[grpc]
address = {socket}

[plugins."io.containerd.grpc.v1.cri".containerd]
snapshotter = {snapshotter}
disable_snapshot_annotations = false
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
[plugins."io.containerd.grpc.v1.cri".cni]
conf_dir = {nothing}
[plugins."io.containerd.grpc.v1.cri".registry]
config_path = {nothing}
"""
_PROXY_PLUGIN = """
[proxy_plugins.{name}]
type = "snapshot"
address = {address}
"""


class Containerd:
    """Runs from the end of the constructor until `stop`, with nothing in its store yet.

    Images are unpacked by its own overlayfs, or not at all if there is a `proxy`: the socket of
    FirstByte's daemon. `name` must be new in the workspace.
    """

    def __init__(self, workspace: Workspace, name: str, proxy: Path | None = None) -> None:
        self.workspace = workspace
        self.directory = workspace.directory(name)
        self.snapshotter = _PROXY if proxy else _DEFAULT
        # Cgroups are the machine's: as unique as the workspace's directory.
        self.cgroup = f"{workspace.path.name}-{name}"
        self.root = self.directory / "root"
        self.socket = self.directory / "containerd.sock"
        self._state = self.directory / "state"
        self._log = self.directory / "log"
        configuration = self.directory / "config.toml"
        configuration.write_text(self._configuration(proxy))
        self._images = ImageService(self.socket, workspace.interruption)
        with self._log.open("wb") as log:
            self._process = workspace.start(
                ["containerd", "--config", configuration],
                output=log.fileno(),
                errors=subprocess.STDOUT,
            )
        self.pid = self._process.pid
        workspace.defer(f"stop {name}", self.stop)
        self._wait()

    def pull(self, reference: str) -> None:
        """Have an image of this machine's platform ready to be started. Raises DemoError."""
        self._images.pull(reference, _PULL_SECONDS)

    def mount(self, reference: str, directory: Path) -> None:
        """Mount an unpacked image read-only; the workspace unmounts it."""
        self.ctr("images", "mount", "--snapshotter", self.snapshotter, reference, directory)

    def ctr(self, *arguments: str | Path) -> str:
        """What ctr prints. Raises DemoError if it fails."""
        return self.workspace.run(self.ctr_command(*arguments), seconds=_COMMAND_SECONDS)

    def ctr_command(self, *arguments: str | Path) -> list[str | Path]:
        """The command line of ctr for this containerd."""
        return ["ctr", "--address", self.socket, "--namespace", _NAMESPACE, *arguments]

    def stop(self) -> None:
        """End it, and whatever runs in containers of its; nothing if it ended already."""
        self._images.close()
        stop_group(self._process)
        shims = self._shims()
        # Not of its state alone: what containerd was just removing has no address there any more.
        sockets = [path for pid in shims for path in _sockets_of(pid)]
        for pid in shims:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        remove_cgroups(self.cgroup)
        addresses = self._state.glob("io.containerd.runtime.v2.task/*/*/address")
        sockets += [Path(one.read_text().removeprefix("unix://")) for one in addresses]
        for path in sockets:
            path.unlink(missing_ok=True)

    def _shims(self) -> list[int]:
        """The processes that watch its containers; they outlive containerd."""
        found = []
        for pid in marked_processes(self.workspace.path):
            with contextlib.suppress(OSError):  # gone meanwhile
                name, *words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                if b"shim" in name and os.fsencode(self.socket) in words:
                    found.append(pid)
        return found

    def _configuration(self, proxy: Path | None) -> str:
        text = _CONFIGURATION.format(
            root=_text(self.root),
            state=_text(self._state),
            socket=_text(self.socket),
            snapshotter=_text(self.snapshotter),
            nothing=_text(self.workspace.directory("nothing")),
        )
        if proxy:
            text += _PROXY_PLUGIN.format(name=_PROXY, address=_text(proxy))
        return text

    def _wait(self) -> None:
        end = time.monotonic() + _READY_SECONDS
        while time.monotonic() < end and self._process.poll() is None:
            if self.socket.exists() and self._images.answers():
                return
            self.workspace.interruption.sleep(_POLL_SECONDS)
        raise DemoError(
            "containerd does not answer", hint="\n".join(self._log.read_text().splitlines()[-5:])
        )


def _sockets_of(shim: int) -> list[Path]:
    """The sockets at which a shim listens, if it has not ended meanwhile. Source: proc(5)."""
    try:
        open_files = {os.readlink(entry) for entry in Path(f"/proc/{shim}/fd").iterdir()}
    except OSError:
        return []
    lines = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()[1:]]
    return [
        Path(fields[7])
        for fields in lines
        if len(fields) == 8
        and f"socket:[{fields[6]}]" in open_files
        and fields[7].startswith(_SHIM_SOCKETS)
    ]


def _text(value: str | Path) -> str:
    """A TOML string: JSON's are, too."""
    return json.dumps(str(value))
