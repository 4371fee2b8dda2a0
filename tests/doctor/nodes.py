"""Made-up nodes to examine: files in memory, and facts that are all well."""

from __future__ import annotations

import fnmatch
import stat
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from snapshotter.doctor.containerd import Facts, examine
from snapshotter.doctor.recommended import LABELS_EXPORT, Expected
from snapshotter.doctor.running import SNAPSHOTTER_TYPE, Plugin, Socket
from snapshotter.doctor.versions import Version

if TYPE_CHECKING:
    from collections.abc import Iterable

    from snapshotter.doctor.findings import Finding

MAIN = Path("/etc/containerd/config.toml")
EXPECTED = Expected(
    address=Path("/run/firstbyte/firstbyte.sock"),
    root=Path("/var/lib/firstbyte"),
    registry_config_path=Path("/etc/containerd/certs.d"),
)
OLD, NEWER, SPLIT, TRANSFER = (
    Version.find(text) for text in ("1.6.20", "1.7.24", "2.0.5", "2.1.9")
)


class MemoryFiles:
    """Files by their names."""

    def __init__(self, files: dict[str, str | bytes]) -> None:
        self._files = {
            name: text.encode() if isinstance(text, str) else text for name, text in files.items()
        }

    def read(self, path: Path) -> bytes:
        try:
            return self._files[str(path)]
        except KeyError:
            raise FileNotFoundError(2, "No such file or directory", str(path)) from None

    def glob(self, pattern: Path) -> Iterable[Path]:
        return map(Path, sorted(fnmatch.filter(self._files, str(pattern))))


@dataclass(frozen=True)
class Fallen:
    reference: str
    kind: str
    reason: str


@dataclass(frozen=True)
class Account:
    """The daemon's account of what it serves."""

    lazy_layers: int = 5
    ordinary_layers: int = 0
    without_labels: int = 0
    idmapped: str = ""
    fallbacks: tuple[Fallen, ...] = ()


def facts(version: Version | None, **other: Any) -> Facts:
    """All is well, but for what is given."""
    well = Facts(
        containerd=version or "none answers",
        kernel=Version(6, 18),
        plugins=[Plugin(SNAPSHOTTER_TYPE, "firstbyte", exports={LABELS_EXPORT: "true"})],
        socket=Socket(stat.S_IFSOCK | 0o600, 0),
        answer_failure=None,
        fuse=True,
        overlay_failure=None,
        overlay_tried=True,
        served=Account(),
    )
    return replace(well, **other)


def examined(
    text: str | bytes, version: Version | None, imports: dict[str, str] | None = None, **other: Any
) -> dict[str, Finding]:
    """What is found with this configuration, by check."""
    files = MemoryFiles({str(MAIN): text, **(imports or {})})
    return {one.check: one for one in examine(facts(version, **other), EXPECTED, MAIN, files)}
