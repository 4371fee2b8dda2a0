"""A registry on loopback: Debian's docker-registry.

Source: distribution's configuration reference (docs/configuration.md, version 2.8).
"""

from __future__ import annotations

import json
import re
import subprocess
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from snapshotter.bench.errors import BenchError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_READY_SECONDS = 20.0
_END_SECONDS = 20.0
_POLL_SECONDS = 0.02
_LISTENING = re.compile(rb"listening on (127\.0\.0\.1:\d+)")


@contextmanager
def running_registry(directory: Path) -> Iterator[str]:
    """Run a registry with its storage in `directory`; gives its HOST:PORT. Raises BenchError."""
    directory.mkdir()
    configuration = {
        "version": 0.1,
        "log": {"accesslog": {"disabled": True}},
        "storage": {"filesystem": {"rootdirectory": str(directory / "storage")}},
        "http": {"addr": "127.0.0.1:0"},  # the kernel picks a port, and the log says which
    }
    path, log_path = directory / "config.yml", directory / "log"
    path.write_text(json.dumps(configuration))  # JSON is YAML
    command = ["docker-registry", "serve", str(path)]
    with log_path.open("wb") as log:
        try:
            process = subprocess.Popen(command, stdout=log, stderr=log)
        except FileNotFoundError:
            raise BenchError(
                "docker-registry is not installed", hint="'make demo' installs it"
            ) from None
    try:
        yield _address(process, log_path)
    finally:
        process.terminate()
        try:
            process.wait(_END_SECONDS)
        finally:
            process.kill()


def _address(process: subprocess.Popen[bytes], log: Path) -> str:
    end = time.monotonic() + _READY_SECONDS
    while process.poll() is None and time.monotonic() < end:
        if match := _LISTENING.search(log.read_bytes()):
            return match[1].decode()
        time.sleep(_POLL_SECONDS)
    raise BenchError("docker-registry does not answer", hint=log.read_text()[-500:])
