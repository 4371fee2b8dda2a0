"""storage.conf, as far as it matters to us. Source: containers-storage.conf(5)."""

from __future__ import annotations

import os
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from index.errors import FirstByteError
from snapshotter.podman import rootless

DEFAULT_GRAPH_ROOT = Path("/var/lib/containers/storage")
"""That of root's podman."""

_VARIABLE = "CONTAINERS_STORAGE_CONF"
_PLACES = (Path("/etc/containers/storage.conf"), Path("/usr/share/containers/storage.conf"))


class StorageConfError(FirstByteError):
    """The file cannot be read, and podman cannot read it either."""


@dataclass(frozen=True)
class StorageConf:
    """What a file says. `path` is None if there is no file, and everything has its default."""

    path: Path | None
    driver: str = ""
    graph_root: Path = DEFAULT_GRAPH_ROOT
    image_stores: tuple[str, ...] = ()
    layer_stores: tuple[str, ...] = ()

    @property
    def stores(self) -> tuple[str, ...]:
        """The directories of all additional stores. No podman starts if one is missing."""
        return (*self.image_stores, *map(_directory, self.layer_stores))


def usual_graph_root() -> Path:
    """Where podman keeps images and containers if nothing is configured."""
    user = rootless.user()
    return user.graph_root if user else DEFAULT_GRAPH_ROOT


def usual_file() -> Path:
    """Where podman looks for the file first."""
    named = os.environ.get(_VARIABLE)
    if named:
        return Path(named)
    user = rootless.user()
    return user.config / "containers/storage.conf" if user else _PLACES[0]


def find_storage_conf() -> Path | None:
    """The file that podman reads."""
    first = usual_file()
    candidates = (first, *_PLACES[1:]) if first == _PLACES[0] else (first,)
    return next((path for path in candidates if path.exists()), None)


def read_storage_conf(path: Path | None) -> StorageConf:
    """Raises StorageConfError."""
    if path is None:
        return StorageConf(None, graph_root=usual_graph_root())
    try:
        document = tomllib.loads(path.read_text())
    except OSError as error:
        raise StorageConfError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise StorageConfError(f"{path} is malformed: {error}") from error
    storage = _table(document, "storage")
    options = _table(storage, "options")
    return StorageConf(
        path,
        driver=str(storage.get("driver", "")),
        graph_root=Path(str(storage.get("graphroot") or usual_graph_root())),
        image_stores=_strings(options, "additionalimagestores"),
        layer_stores=_strings(options, "additionallayerstores"),
    )


def _directory(entry: str) -> str:
    """That of an entry of additionallayerstores, which may end with an option."""
    path, colon, _ = entry.rpartition(":")
    return path if colon else entry


def _table(of: dict[str, Any], name: str) -> dict[str, Any]:
    found = of.get(name, {})
    return found if isinstance(found, dict) else {}


def _strings(of: dict[str, Any], name: str) -> tuple[str, ...]:
    found = of.get(name, [])
    return tuple(map(str, found)) if isinstance(found, list) else ()
