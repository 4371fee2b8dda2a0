"""A real registry on loopback, with its storage in the workspace: Debian's docker-registry.

Source: distribution's configuration reference (docs/configuration.md, version 2.8).
"""

from __future__ import annotations

import re
import subprocess
import time
from typing import TYPE_CHECKING

import msgspec

from snapshotter.demo.errors import DemoError
from snapshotter.demo.workspace import stop_group
from snapshotter.registry.endpoint import is_loopback
from snapshotter.registry.reference import LAYOUT_PREFIX, Reference

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from snapshotter.demo.workspace import Workspace

_READY_SECONDS = 20.0
_COPY_SECONDS = 3600.0  # a large image over a slow line
_POLL_SECONDS = 0.02

_CONFIGURATION = """\
version: 0.1
log:
  level: info
  formatter: json
  accesslog:
    disabled: true
storage:
  cache:
    blobdescriptor: inmemory
  filesystem:
    rootdirectory: {storage}
http:
  addr: {address}
"""
_SPARING = {"GOGC": "400"}
"""It stands for another machine, and here takes the processors of the node that it serves. For each
request it reads 4 MiB of the blob into a new buffer: 7 ms, half of them for collecting buffers at
once. It uses 75 MB of memory so."""

_ANY_PORT = "127.0.0.1:0"  # the kernel picks a free one, and the log says which
_LISTENING = re.compile(rb"listening on ([\d.:\[\]]+:\d+)")


class _LogLine(msgspec.Struct, frozen=True):
    """As far as it matters here."""

    message: str = msgspec.field(name="msg", default="")
    method: str = msgspec.field(name="http.request.method", default="")


class LocalRegistry:
    """`host` is HOST:PORT; it answers from the end of the constructor until `stop`."""

    def __init__(
        self,
        workspace: Workspace,
        *,
        enter: Sequence[str] = (),
        address: str = _ANY_PORT,
        host: str = "",
        storage: Path | None = None,
    ) -> None:
        """Listens on `address`, in the namespace that the command `enter` enters; `host` is where
        it is reached from outside of that. What a `storage` holds stays, and was there before."""
        self._workspace = workspace
        directory = workspace.directory("registry")
        configuration = directory / "config.yml"
        self.storage = storage or directory / "storage"
        configuration.write_text(_CONFIGURATION.format(storage=self.storage, address=address))
        self._log = directory / "log"
        with self._log.open("wb") as log:
            self._process = workspace.start(
                [*enter, "docker-registry", "serve", configuration],
                output=log.fileno(),
                errors=subprocess.STDOUT,
                environment=_SPARING,
            )
        workspace.defer("stop the registry", self.stop)
        listening = self._wait()
        self.host = host or listening

    def stop(self) -> None:
        """End it; nothing if it ended already."""
        stop_group(self._process)

    def copy_in(self, image: str, name: str) -> None:
        """Copy an image, unchanged, into this registry, as `name` (REPOSITORY:TAG).

        `image` is a reference as people type it, or oci:PATH:TAG. Of one for several platforms,
        that of this machine is copied. Raises InvalidReferenceError or DemoError.
        """
        source, options = image, []
        if not image.startswith(LAYOUT_PREFIX):
            source = f"docker://{image}"
            if is_loopback(Reference.parse(image).registry):
                options = ["--src-tls-verify=false"]
        copy = ["skopeo", "copy", "--quiet", "--preserve-digests", "--dest-tls-verify=false"]
        self._workspace.run(
            [*copy, *options, source, f"docker://{self.host}/{name}"], seconds=_COPY_SECONDS
        )

    def answered(self) -> int:
        """How many requests to read something have been answered so far."""
        lines = (_decode(line) for line in self._log.read_bytes().splitlines())
        return sum(line.message == "response completed" and line.method == "GET" for line in lines)

    def _wait(self) -> str:
        end = time.monotonic() + _READY_SECONDS
        while time.monotonic() < end and self._process.poll() is None:
            if match := _LISTENING.search(self._log.read_bytes()):
                return match[1].decode()
            self._workspace.interruption.sleep(_POLL_SECONDS)
        raise DemoError("docker-registry does not answer", hint=self._log.read_text()[-500:])


def _decode(line: bytes) -> _LogLine:
    try:
        return msgspec.json.decode(line, type=_LogLine)
    except msgspec.DecodeError:
        return _LogLine()  # not of the registry's log, or not written to its end
