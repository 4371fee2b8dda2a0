"""A registry behind a link, for benchmarks and for anybody who wants to see what distance costs."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from snapshotter.bench.errors import BenchError
from snapshotter.bench.link.counters import Carried, Counters
from snapshotter.bench.link.network import REGISTRY_PORT, Network
from snapshotter.demo.registry import LocalRegistry
from snapshotter.demo.workspace import stop_group

if TYPE_CHECKING:
    from typing import BinaryIO

    from snapshotter.bench.link.profiles import LinkProfile
    from snapshotter.demo.workspace import Workspace

_ANSWER_SECONDS = 30.0


class Link:
    """A link to nowhere yet, and two empty network namespaces, `near` and `far`, as files.

    Who connects to `host` (HOST:PORT) reaches what listens in `far`, over the link; at `direct`,
    without it. Everything is gone after `stop`, or with this process. Needs root.
    """

    def __init__(self, workspace: Workspace, profile: LinkProfile) -> None:
        self._workspace = workspace
        counters = workspace.directory("link") / "counters"
        self._counters = Counters(counters)
        self._log = counters.with_name("log")
        with self._log.open("wb") as log:
            self._process = workspace.start(
                [sys.executable, "-m", "snapshotter.bench.link.network", counters],
                source=subprocess.PIPE,
                output=subprocess.PIPE,
                errors=log.fileno(),
            )
        workspace.defer("take the link down", self.stop)
        network = msgspec.json.decode(self._answer(), type=Network)
        self.host, self.direct = network.delayed, network.direct
        self.near = Path(f"/proc/{network.pid}/fd/{network.near}")
        self.far = Path(f"/proc/{network.pid}/fd/{network.far}")
        self.profile = profile
        self.change(profile)

    def change(self, profile: LinkProfile) -> None:
        """Be like that from now on. Connections that are open keep the former delay."""
        assert self._process.stdin
        try:
            self._process.stdin.write(msgspec.json.encode(profile) + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # the missing answer is the error
        self._answer()
        self.profile = profile

    def carried(self) -> Carried:
        """What has gone over the link so far."""
        return self._counters.read()

    def stop(self) -> None:
        """Cut it, and remove it; nothing if that was done."""
        stop_group(self._process)
        for end in (self._process.stdin, self._process.stdout):
            if end:
                end.close()

    def _answer(self) -> bytes:
        """One line. Raises BenchError if the process has none to give."""
        output = self._process.stdout
        assert output
        found: list[bytes] = []
        reader = threading.Thread(target=_read_line, args=(output, found), daemon=True)
        reader.start()
        reader.join(_ANSWER_SECONDS)
        if found and found[0]:
            return found[0]
        lines = self._log.read_text().splitlines()
        raise BenchError("there is no network link to measure with", hint="\n".join(lines[-3:]))


class DistantRegistry:
    """A real registry at the far end of a link. References with `host` go over the link, those
    with `direct` do not: for what is not measured. What it is given is kept in `storage`, if there
    is one."""

    def __init__(
        self, workspace: Workspace, profile: LinkProfile, storage: Path | None = None
    ) -> None:
        self.link = Link(workspace, profile)
        self.host, self.direct = self.link.host, self.link.direct
        self.registry = LocalRegistry(
            workspace,
            enter=("nsenter", f"--net={self.link.far}", "--"),
            address=f"0.0.0.0:{REGISTRY_PORT}",
            host=self.direct,
            storage=storage,
        )
        self._storage = self.registry.storage / "docker" / "registry" / "v2"

    def stored(self, digest: str) -> Path:
        """The file in which the registry keeps a blob."""
        name = digest.removeprefix("sha256:")
        return self._storage / "blobs" / "sha256" / name[:2] / name / "data"

    def read_into_memory(self, repository: str) -> None:
        """Have the kernel keep what the registry stores of an image, so that its disk is not
        measured along with the link: the registry of others is another machine.

        Raises BenchError if there is no such image.
        """
        links = [*(self._storage / "repositories" / repository).rglob("link")]
        if not links:
            raise BenchError(f"there is no {repository} in the registry")
        buffer = bytearray(1 << 20)
        for digest in {link.read_text() for link in links}:
            with self.stored(digest).open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass


def _read_line(stream: BinaryIO, found: list[bytes]) -> None:
    found.append(stream.readline())
