"""containerd's configuration as containerd sees it: imports merged, old versions converted.

Rules as of containerd 1.6, 1.7 and 2.1 (`cmd/containerd/server/config`, `plugins/cri/images`),
tried with `containerd config dump`:

- An import replaces a proxy plugin as a whole. It also replaces the settings of any other plugin as
  a whole before 2.0, and merges with them table by table since.
- A relative pattern (`conf.d/*.toml`) starts where the file is, but in 1.6 where containerd was
  started, which is the root.
- containerd 2 converts files of version 2. What it takes over from the CRI plugin's `containerd`
  table, it takes only if that table has a `runtimes` table.

Nothing here does I/O.
"""

from __future__ import annotations

import posixpath
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from index.errors import FirstByteError
from snapshotter.doctor.versions import CONTAINERD_2, CONTAINERD_RELATIVE_IMPORTS

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from snapshotter.doctor.versions import Version

CRI = "io.containerd.grpc.v1.cri"
"""The CRI plugin before containerd 2."""

CRI_IMAGES = "io.containerd.cri.v1.images"
"""The part of the CRI plugin that pulls, since containerd 2."""

TRANSFER = "io.containerd.transfer.v1.local"

_MAX_FILES = 1000  # a guess; more than anybody imports
_OF_CONTAINERD_TABLE = ("snapshotter", "disable_snapshot_annotations", "discard_unpacked_layers")
_OF_CRI = ("registry", "max_concurrent_downloads", "image_pull_with_sync_fs")

Table = dict[str, Any]


class ConfigurationError(FirstByteError):
    """containerd cannot use this configuration."""


class Files(Protocol):
    """The file system, as far as it is needed here."""

    def read(self, path: Path) -> bytes:
        """All of a file. Raises OSError."""

    def glob(self, pattern: Path) -> Iterable[Path]:
        """The files of a pattern, sorted."""


@dataclass(frozen=True, slots=True)
class Configuration:
    """The merged settings of `files`, in the form of containerd 2 if `split`, else of 1.x.

    `lost_settings` are files of version 2 whose snapshotter containerd 2 does not take over.
    """

    version: int
    files: tuple[Path, ...]
    settings: Table
    split: bool
    lost_settings: tuple[Path, ...] = ()

    @property
    def pulling(self) -> Table:
        """The table of CRI that has `snapshotter` in it."""
        if self.split:
            return self.plugin(CRI_IMAGES)
        return table(self.plugin(CRI), "containerd")

    @property
    def registry(self) -> Table:
        """CRI's table about registries."""
        return table(self.plugin(CRI_IMAGES if self.split else CRI), "registry")

    @property
    def proxies(self) -> dict[str, Table]:
        """The proxy plugins that are tables."""
        found = table(self.settings, "proxy_plugins")
        return {name: value for name, value in found.items() if isinstance(value, dict)}

    def plugin(self, name: str) -> Table:
        """The settings of a plugin."""
        return table(self.settings, "plugins", name)


def table(settings: Table, *keys: str) -> Table:
    """A table inside others; empty if there is none."""
    for key in keys:
        below = settings.get(key)
        if not isinstance(below, dict):
            return {}
        settings = below
    return settings


def load(path: Path, files: Files, containerd: Version | None) -> Configuration:
    """Read the file and all that it imports, as this version of containerd would.

    Without a version, files of version 3 are read as by 2.x, others as by 1.x. Raises
    ConfigurationError, and OSError if the file itself cannot be read.
    """
    settings = _parse(path, files.read(path))
    version = _version(settings)
    if version < 2:
        raise ConfigurationError(
            f"{path} has {'version 1' if version else 'no version'}, with names that only old "
            "releases of containerd know",
            hint="convert it to version 2 or later: containerd config migrate (1.7 and later)",
        )
    split = containerd >= CONTAINERD_2 if containerd else version > 2
    if version > 2 and not split:
        raise ConfigurationError(
            f"{path} has version {version}, and containerd {containerd} knows 2 at most",
            hint="write it in version 2",
        )
    rooted = containerd is not None and containerd < CONTAINERD_RELATIVE_IMPORTS
    merged: Table = {}
    lost: list[Path] = []
    loaded: list[Path] = []
    pending = [path]
    while pending:
        current = pending.pop(0)
        if current in loaded:
            continue
        if len(loaded) == _MAX_FILES:
            raise ConfigurationError(f"{path} imports more than {_MAX_FILES} files")
        if current != path:
            settings = _import(current, files, version)
        loaded.append(current)
        pending += _imports(Path("/") if rooted else current.parent, current, settings, files)
        if split and _version(settings) < 3:
            lost += [current] * _loses_snapshotter(settings)
            settings = _convert(settings)
        _merge(merged, settings, deep=split)
    return Configuration(version, tuple(loaded), merged, split, tuple(lost))


def _parse(path: Path, text: bytes) -> Table:
    try:
        return tomllib.loads(text.decode())
    except (ValueError, RecursionError) as error:  # among them TOMLDecodeError, UnicodeDecodeError
        if b"{{" in text:
            raise ConfigurationError(
                f"{path} is a template, not the file that containerd reads",
                hint="give --config the file made from it; k3s and RKE2 put it beside the template "
                "as config.toml",
            ) from error
        said = "tables too deep" if isinstance(error, RecursionError) else str(error)
        raise ConfigurationError(f"{path} is not TOML ({said})") from error


def _version(settings: Table) -> int:
    version = settings.get("version", 0)
    return version if isinstance(version, int) else 0


def _import(path: Path, files: Files, highest: int) -> Table:
    try:
        settings = _parse(path, files.read(path))
    except OSError as error:
        raise ConfigurationError(
            f"the imported {path} cannot be read ({error.strerror})",
            hint="containerd does not start without it",
        ) from error
    if _version(settings) > highest:
        raise ConfigurationError(
            f"the imported {path} has version {_version(settings)}, the file that imports it "
            f"{highest}",
            hint=f"write it in version {highest}",
        )
    return settings


def _imports(patterns_from: Path, path: Path, settings: Table, files: Files) -> list[Path]:
    """What a file imports; relative paths start where the file is, patterns where it is said."""
    imports = settings.get("imports")
    found: list[Path] = []
    for entry in imports if isinstance(imports, list) else ():
        if not isinstance(entry, str) or not entry or "\0" in entry:
            continue
        if "*" in entry:
            found += files.glob(Path(posixpath.normpath(patterns_from / entry)))
        else:
            found.append(Path(posixpath.normpath(path.parent / entry)))
    return found


def _loses_snapshotter(settings: Table) -> bool:
    conf = table(settings, "plugins", CRI, "containerd")
    return "runtimes" not in conf and any(key in conf for key in _OF_CONTAINERD_TABLE)


def _convert(settings: Table) -> Table:
    """A file of version 2 as containerd 2 takes it: CRI's settings about images move."""
    plugins = dict(table(settings, "plugins"))
    old = table(plugins, CRI)
    conf = table(old, "containerd")
    images = dict(table(plugins, CRI_IMAGES))
    if "runtimes" in conf:
        images |= {key: conf[key] for key in _OF_CONTAINERD_TABLE if key in conf}
    images |= {key: old[key] for key in _OF_CRI if key in old}
    return {**settings, "plugins": {**plugins, CRI_IMAGES: images}}


def _merge(into: Table, settings: Mapping[str, Any], *, deep: bool) -> None:
    for key, value in settings.items():
        if key in ("plugins", "proxy_plugins") and isinstance(value, dict):
            there = into.setdefault(key, {})
            if not isinstance(there, dict):
                into[key] = value
            elif key == "plugins" and deep:
                into[key] = _deep(there, value)
            else:
                into[key] = {**there, **value}
        else:
            into[key] = value


def _deep(lower: Table, upper: Table) -> Table:
    merged = dict(lower)
    for key, value in upper.items():
        below = merged.get(key)
        if isinstance(below, dict) and isinstance(value, dict):
            merged[key] = _deep(below, value)
        else:
            merged[key] = value
    return merged
