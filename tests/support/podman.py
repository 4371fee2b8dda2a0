"""podman of three generations, each with storage of its own, on the stores of one instance."""

from __future__ import annotations

import json
import os
import subprocess
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from snapshotter.mounts import syscalls
from snapshotter.mounts.table import read_mounts
from tests.support.debian_root import entered
from tests.support.instance import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tests.support.debian_root import Suite

Version = Literal["4.3", "5.4", "5.8"]
VERSIONS = get_args(Version)

_SUITES: dict[str, Suite] = {"5.4": "trixie", "5.8": "sid"}
_GLOBAL = ("--cgroup-manager=cgroupfs", "--runtime", "runc")
# Where there is no CAP_SYS_RESOURCE, and no network of ours.
_CONTAINER = ("--network=host", "--ulimit=nofile=1024:1024", "--ulimit=nproc=1024:1024")
_WITH_CONTAINER = {"run", "create", "build"}


class Podman:
    """A podman whose storage is in `base`, a short path. What it mounts is seen below `seen`."""

    seen = Path("/")

    def __init__(self, version: Version, base: Path, prefix: Sequence[str]) -> None:
        self.version = version
        self.base = base
        self.graph_root = base / "graph"
        self.run_root = base / "run"
        self._prefix = prefix

    def configure(self, **options: Sequence[Path | str]) -> None:
        """Write storage.conf, with these keys of [storage.options], and containers.conf."""
        lines = [
            "[storage]",
            'driver = "overlay"',
            f'graphroot = "{self.graph_root}"',
            f'runroot = "{self.run_root}"',
            "[storage.options]",
            *(
                f"{key} = {json.dumps([str(one) for one in value])}"
                for key, value in options.items()
            ),
        ]
        (self.base / "storage.conf").write_text("\n".join(lines) + "\n")
        # What podmans share else: `system reset` of one takes it from all others.
        (self.base / "containers.conf").write_text(
            f'[engine]\nlock_type = "file"\ntmp_dir = "{self.base}/libpod"\n'
        )

    def start(self, command: str, *arguments: str | Path) -> subprocess.Popen[str]:
        """A podman that runs."""
        container = _CONTAINER if command in _WITH_CONTAINER else ()
        words = [*_GLOBAL, command, *container, *map(str, arguments)]
        (self.base / "tmp").mkdir(exist_ok=True)
        return subprocess.Popen(
            [*self._prefix, "podman", *words],
            env=self.environment(),
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def environment(self) -> dict[str, str]:
        return os.environ | {
            "CONTAINERS_CONF": str(self.base / "containers.conf"),
            "CONTAINERS_STORAGE_CONF": str(self.base / "storage.conf"),
            "CONTAINERS_REGISTRIES_CONF": str(self.base / "registries.conf"),
            "PODMAN_IGNORE_CGROUPSV1_WARNING": "1",
            "TMPDIR": str(self.base / "tmp"),
            "HOME": str(self.base),
        }

    def run(self, command: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        with self.start(command, *arguments) as process:
            output, errors = process.communicate(timeout=120)
        return subprocess.CompletedProcess(process.args, process.returncode, output, errors)

    def succeed(self, command: str, *arguments: str | Path) -> str:
        """What it prints, without the newline at the end."""
        done = self.run(command, *arguments)
        assert done.returncode == 0, (done.args, done.stderr)
        return done.stdout.rstrip("\n")

    def fail(self, command: str, *arguments: str | Path) -> str:
        """What a command says that has to fail."""
        done = self.run(command, *arguments)
        assert done.returncode != 0, done.stdout
        return done.stderr

    def tree(self, container: str) -> Path:
        """The root directory of a container, mounted."""
        return self.seen / self.succeed("mount", container).lstrip("/")

    def images(self) -> dict[str, dict[str, Any]]:
        """What `podman images` knows, by each name."""
        listed = json.loads(self.succeed("images", "--format", "json"))
        return {name: image for image in listed for name in image.get("Names") or []}

    def settle(self) -> None:
        """Wait until what podman does by itself when a container has ended is done: it writes where
        `system reset` deletes."""
        base = os.fsencode(self.base) + b"/"
        wait_until(lambda: not any(base in line for line in _command_lines()))

    def reset(self) -> None:
        """Nothing is left in its storage. (A podman that has nothing to do takes half a second.)"""
        if self._has("containers"):
            self.run("rm", "-af", "-t", "0")
        if self._has("images"):
            self.run("rmi", "-af")

    def _has(self, kind: str) -> bool:
        """Whether there are records of a kind on disk; volatile ones are of `run --rm`."""
        folders = (self.graph_root / f"overlay-{kind}", self.run_root / f"overlay-{kind}")
        return any(json.loads(file.read_bytes()) for one in folders for file in one.glob("*.json"))

    def close(self) -> None:
        self.run("rm", "-af", "-t", "0")
        prefix = os.fsencode(self.base) + b"/"
        for entry in reversed(read_mounts()):
            if entry.point.startswith(prefix):
                syscalls.unmount(Path(os.fsdecode(entry.point)), detach=True)


def _command_lines() -> Iterator[bytes]:
    """Of all processes, their words ended by zeros."""
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it has ended
            yield file.read_bytes()


@contextmanager
def podman(
    version: Version, base: Path, registry: str, binds: Sequence[Path] = ()
) -> Iterator[Podman]:
    """A podman with an empty storage below `base`, where later mounts below `binds` are seen."""
    base.mkdir()
    (base / "registries.conf").write_text(
        f'[[registry]]\nlocation = "{registry}"\ninsecure = true\n'
    )
    if version == "4.3":
        made = Podman(version, base, ())
        try:
            yield made
        finally:
            made.close()
        return
    with entered(_SUITES[version], [base, *binds]) as root:
        made = Podman(version, base, root.prefix)
        made.seen = Path(f"/proc/{root.pid}/root")
        try:
            yield made
        finally:
            made.close()
