"""Builds images from recipes, once: finished layers and images are kept for later runs."""

from __future__ import annotations

import fcntl
import hashlib
import os
import random
import sys
import tarfile
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import msgspec

from snapshotter.bench.recipes import debian
from snapshotter.demo.layout import HostFile, Layer, MadeFile, write_image, write_layer
from snapshotter.registry.platform import Platform
from snapshotter.registry.reference import LAYOUT_PREFIX

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from snapshotter.bench.recipes.recipe import Recipe
    from snapshotter.demo.layout import Member
    from snapshotter.demo.workspace import Workspace

DEFAULT_CACHE = Path("/var/cache/firstbyte-bench")

_VERSION = 1  # of how layers are made: others are made anew
_PIP_DIRECTORY = "usr/local/lib/python3.11/dist-packages"  # where Debian's Python looks
_PIP_SECONDS = 1800.0
_DATA_FILE = "data/blob"
_DATA_SEED = 1
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_POLL_SECONDS = 0.5


class Builder:
    """Keeps images in an OCI layout below `cache`, which several may use at the same time."""

    def __init__(self, workspace: Workspace, cache: Path, say: Callable[[str], None]) -> None:
        self._workspace = workspace
        self._say = say
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._cache = cache
        self._layout = cache / "layout"
        self._blobs = self._layout / "blobs" / "sha256"
        self._notes = cache / "layers"
        for path in (self._blobs, self._notes):
            path.mkdir(parents=True, exist_ok=True)

    def image(self, name: str, recipe: Recipe) -> str:
        """The image of a recipe, oci:PATH:TAG, which is built if it is not there.

        Raises DemoError if a program that builds it fails.
        """
        tag = f"{name}-{recipe.key()}"
        layers = self._layers(name, recipe)
        platform = Platform.host()
        environment = {"PATH": _PATH, **recipe.environment}
        config = {
            "architecture": platform.architecture,
            "os": platform.os,
            "config": {
                "User": recipe.user,
                "WorkingDir": recipe.directory,
                "Env": [f"{key}={value}" for key, value in environment.items()],
                "Cmd": recipe.command,
            },
        }
        with self._locked("layout"):
            write_image(self._layout, tag, layers, config)
        return f"{LAYOUT_PREFIX}{self._layout}:{tag}"

    def _layers(self, name: str, recipe: Recipe) -> list[Layer]:
        with tempfile.TemporaryDirectory(dir=self._cache, prefix="building-") as directory:
            build = _Build(
                self._workspace, self._cache, Path(directory), recipe, _about(self._say, name)
            )
            layers: list[Layer] = []
            for part, key in build.parts():
                layers += self._kept(key) or self._make(part, key)
        return layers

    def _make(self, part: Callable[[], Iterator[list[Member]]], key: str) -> list[Layer]:
        with self._locked(key):
            if kept := self._kept(key):
                return kept  # somebody else has made them meanwhile
            check = self._workspace.interruption.check
            made = [write_layer(self._blobs, key, members, check) for members in part()]
            note = self._notes / f"{key}.json"
            unfinished = note.with_suffix(".new")
            unfinished.write_bytes(msgspec.json.encode(made))
            unfinished.rename(note)
            return made

    def _kept(self, key: str) -> list[Layer]:
        try:
            noted = (self._notes / f"{key}.json").read_bytes()
        except FileNotFoundError:
            return []
        layers = msgspec.json.decode(noted, type=list[Layer])
        there = (self._blobs / layer.digest.removeprefix("sha256:") for layer in layers)
        return layers if all(path.exists() for path in there) else []

    @contextmanager
    def _locked(self, what: str) -> Iterator[None]:
        with (self._notes / f"{what}.lock").open("w") as lock:
            while not _lock(lock):
                self._workspace.interruption.sleep(_POLL_SECONDS)
            yield


def _lock(file: TextIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _about(say: Callable[[str], None], name: str) -> Callable[[str], None]:
    """Say it of an image."""
    return lambda what: say(f"{name}: {what}")


class _Build:
    """One image that is being made in a directory of its own. What all images begin with is kept
    in `cache`."""

    def __init__(
        self,
        workspace: Workspace,
        cache: Path,
        directory: Path,
        recipe: Recipe,
        say: Callable[[str], None],
    ) -> None:
        self._workspace = workspace
        self._base = cache / f"{_key('base')}.tar"
        self._directory = directory
        self._recipe = recipe
        self._say = say
        self._roots: dict[tuple[str, ...], Path] = {}

    def parts(self) -> Iterator[tuple[Callable[[], Iterator[list[Member]]], str]]:
        """What makes one layer or several, and a key that is equal if they would be."""
        recipe = self._recipe
        lower: tuple[str, ...] | None = None
        upper: tuple[str, ...] = ()
        for number, packages in enumerate([[], *recipe.packages]):
            upper = (*upper, *packages)
            split = recipe.split if number == len(recipe.packages) else 1
            yield self._debian(lower, upper, split), _key("debian", lower, upper, split)
            lower = upper
        for requirements in recipe.pip:
            yield self._pip(requirements), _key("pip", requirements)
        if recipe.data_mb:
            yield self._data(recipe.data_mb), _key("data", recipe.data_mb)
        if recipe.files:
            files = [(file.path, file.text, file.mode) for file in recipe.files]
            yield self._files, _key("files", files)

    def _debian(
        self, lower: tuple[str, ...] | None, upper: tuple[str, ...], split: int
    ) -> Callable[[], Iterator[list[Member]]]:
        def make() -> Iterator[list[Member]]:
            below = self._root(lower) if lower is not None else None
            members = debian.difference(below, self._root(upper))
            for number in range(split):
                yield members[number * len(members) // split : (number + 1) * len(members) // split]

        return make

    def _root(self, packages: tuple[str, ...]) -> Path:
        if not packages and self._base.exists():
            return self._base
        if packages not in self._roots:
            what = f" with {', '.join(packages)}" if packages else ""
            self._say(f"installing Debian {debian.SUITE}{what}")
            path = self._directory / f"root-{len(self._roots)}.tar"
            debian.write_root(self._workspace, packages, path)
            self._say("compressing")
            if not packages:
                path = path.rename(self._base)
            self._roots[packages] = path
        return self._roots[packages]

    def _pip(self, requirements: Sequence[str]) -> Callable[[], Iterator[list[Member]]]:
        def make() -> Iterator[list[Member]]:
            self._say(f"installing {', '.join(requirements)}")
            target = self._directory / _key("pip", requirements)
            command = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(target)]
            command += ["--no-warn-script-location", "--disable-pip-version-check"]
            command += ["--python-version=3.11", "--only-binary=:all:", *requirements]
            self._workspace.run(
                command,
                seconds=_PIP_SECONDS,
                environment={"SOURCE_DATE_EPOCH": str(debian.EPOCH), "PYTHONHASHSEED": "0"},
            )
            self._say("compressing")
            yield [
                HostFile(f"{_PIP_DIRECTORY}/{path.relative_to(target)}", path, dated=False)
                for path in sorted(target.rglob("*"))
            ]

        return make

    def _data(self, megabytes: int) -> Callable[[], Iterator[list[Member]]]:
        def make() -> Iterator[list[Member]]:
            self._say(f"making {megabytes} MB of data")
            path = self._directory / "data"
            rng = random.Random(_DATA_SEED)  # noqa: S311  (the same each time)
            with path.open("wb") as file:
                for _ in range(megabytes):
                    file.write(rng.randbytes(1_000_000))
            self._say("compressing")
            yield [HostFile(_DATA_FILE, path, dated=False)]

        return make

    def _files(self) -> Iterator[list[Member]]:
        members: list[Member] = []
        for file in self._recipe.files:
            header = tarfile.TarInfo(file.path.lstrip("/"))
            header.mode = file.mode
            header.mtime = debian.EPOCH
            data = file.text.encode()
            header.size = len(data)
            members.append(MadeFile(header, data))
        yield members


def _key(*parts: object) -> str:
    recipe = repr((_VERSION, debian.SUITE, os.uname().machine, parts))
    return hashlib.sha256(recipe.encode()).hexdigest()[:32]
