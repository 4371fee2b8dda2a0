"""The conditions of a measurement, without which its numbers mean nothing."""

from __future__ import annotations

import os
import platform
import re
import ssl
import zlib
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import zstandard

from snapshotter.bench.tables import Table
from snapshotter.mounts.table import read_mounts

_PACKAGES = ("isal", "lz4", "pyfuse3", "trio", "httpx", "msgspec")
_MODEL = re.compile(r"^model name\s*:\s*(.+)$", re.MULTILINE)


class Conditions:
    """Watches from its construction until `table` is asked for."""

    def __init__(self, directory: Path) -> None:
        """`directory` is where everything that is read or written lies."""
        self._directory = directory
        self._started = datetime.now(UTC)
        self._load_before = os.getloadavg()[0]

    def table(self) -> Table:
        """Machine, software, time and load."""
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        versions = [f"{name} {metadata.version(name)}" for name in _PACKAGES]
        versions += [
            f"zlib {zlib.ZLIB_RUNTIME_VERSION}",
            f"zstd {'.'.join(map(str, zstandard.ZSTD_VERSION))}",
            ssl.OPENSSL_VERSION.rsplit(" ", 3)[0],
        ]
        load = f"{self._load_before:.2f} when it began, {os.getloadavg()[0]:.2f} at the end"
        return Table(
            "Conditions",
            ("what", "value"),
            (
                ("date", f"{self._started:%Y-%m-%d %H:%M} UTC"),
                ("processor", f"{_processor()}, {os.cpu_count()} cores"),
                ("memory", f"{memory / 2**30:.1f} GiB"),
                ("file system", _file_system(self._directory)),
                ("kernel", f"{platform.system()} {platform.release()}"),
                ("Python", platform.python_version()),
                ("libraries", ", ".join(versions)),
                ("load average (1 minute)", load),
            ),
        )


def _processor() -> str:
    found = _MODEL.search(Path("/proc/cpuinfo").read_text())
    return found[1] if found else platform.machine()


def _file_system(directory: Path) -> str:
    """Kind and device of what `directory` is on: of the mount with the longest matching path."""
    path = os.fsencode(directory.resolve())
    above = [
        entry
        for entry in read_mounts()
        if path == entry.point or path.startswith(entry.point.rstrip(b"/") + b"/")
    ]
    entry = max(reversed(above), key=lambda entry: len(entry.point))
    return f"{entry.kind.decode()} on {entry.source.decode(errors='replace')}"
