"""storage.conf, as far as it matters to us. Source: containers-storage.conf(5)."""

from __future__ import annotations

import os
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from index.errors import FirstByteError

DEFAULT_GRAPH_ROOT = Path("/var/lib/containers/storage")

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


def find_storage_conf() -> Path | None:
    """The file that root's podman reads."""
    named = os.environ.get(_VARIABLE)
    candidates = (Path(named),) if named else _PLACES
    return next((path for path in candidates if path.exists()), None)


def read_storage_conf(path: Path | None) -> StorageConf:
    """Raises StorageConfError."""
    if path is None:
        return StorageConf(None)
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
        graph_root=Path(str(storage.get("graphroot") or DEFAULT_GRAPH_ROOT)),
        image_stores=_strings(options, "additionalimagestores"),
        layer_stores=_strings(options, "additionallayerstores"),
    )


def _table(of: dict[str, Any], name: str) -> dict[str, Any]:
    found = of.get(name, {})
    return found if isinstance(found, dict) else {}


def _strings(of: dict[str, Any], name: str) -> tuple[str, ...]:
    found = of.get(name, [])
    return tuple(map(str, found)) if isinstance(found, list) else ()
