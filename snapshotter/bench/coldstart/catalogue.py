"""Which images are measured: a list in TOML, of ours or of the user's own.

    [[image]]
    name = "redis"
    reference = "docker.io/library/redis:7"
    ready = { tcp = 6379, send = "PING\\r\\n", expect = '^\\+PONG' }
    work = { tcp = 6379, send = "PING\\r\\n", expect = '^\\+PONG', times = 100 }

`recipe` in the place of `reference` has the image built (`recipes/recipe.py` tells its keys).
"""

from __future__ import annotations

import re
from importlib import resources
from typing import TYPE_CHECKING

import msgspec

from snapshotter.bench.errors import BenchError
from snapshotter.bench.recipes.recipe import Recipe  # noqa: TC001  (msgspec reads it)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

BUILT, PUBLIC = "built", "public"
"""The lists that come with FirstByte."""

_NAME = re.compile(r"[a-z0-9]+(?:[.-][a-z0-9]+)*")
_HTTP = re.compile(r"(?P<port>\d{1,5})(?P<path>/\S*)")


class Check(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a workload has to answer; exactly one of `http`, `tcp` and `line`.

    `http` is PORT/PATH, answered with status 200 and a body. `tcp` is a port: what comes back for
    `send` has to match `expect`. `line` is a pattern for a line of the workload's output. The check
    is made `times` times, which is one unless it is work.
    """

    http: str = ""
    tcp: int = 0
    send: str = ""
    expect: str = ""
    line: str = ""
    times: int = 1

    def __post_init__(self) -> None:
        if sum(map(bool, (self.http, self.tcp, self.line))) != 1:
            raise ValueError("a check has one of `http`, `tcp` and `line`")
        if self.http and not _HTTP.fullmatch(self.http):
            raise ValueError(f"`http` is PORT/PATH, not {self.http!r}")
        if bool(self.tcp) != bool(self.expect):
            raise ValueError("`tcp` and `expect` go together")
        for pattern in (self.expect, self.line):
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is no pattern: {error}") from error

    @property
    def http_target(self) -> tuple[int, str]:
        """Port and path of an `http` check."""
        match = _HTTP.fullmatch(self.http)
        assert match
        return int(match["port"]), match["path"]


class Image(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An image, its workload, and when that is ready.

    `command` replaces the image's own; `environment` is added to its. `work` is done once it is
    ready, to see what comes after. A start may take `within` seconds. `group` is for selecting.
    """

    name: str
    ready: Check
    reference: str = ""
    recipe: Recipe | None = None
    group: str = ""
    command: list[str] = []
    environment: dict[str, str] = {}
    work: Check | None = None
    within: float = 900.0

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ValueError(f"{self.name!r} is no name for an image: letters, digits, . and -")
        if bool(self.reference) == bool(self.recipe):
            raise ValueError(f"image {self.name} needs either a reference or a recipe")


class _Catalogue(msgspec.Struct, forbid_unknown_fields=True):
    image: list[Image]


def builtin(name: str) -> list[Image]:
    """A list that comes with FirstByte."""
    folder = resources.files("snapshotter.bench.coldstart")
    return parse((folder / f"{name}.toml").read_text(encoding="utf-8"), name)


def load(path: Path) -> list[Image]:
    """A list of the user's. Raises BenchError, or OSError."""
    return parse(path.read_text(encoding="utf-8"), str(path))


def parse(text: str, where: str) -> list[Image]:
    """Read a list; `where` it is from is for errors. Raises BenchError."""
    try:
        images = msgspec.toml.decode(text, type=_Catalogue).image
    except (msgspec.DecodeError, ValueError) as error:
        raise BenchError(f"{where} is no list of images: {error}") from error
    names = [image.name for image in images]
    if twice := {name for name in names if names.count(name) > 1}:
        raise BenchError(f"{where} has several images of the name {min(twice)}")
    return images


def choose(images: Sequence[Image], names: Sequence[str]) -> list[Image]:
    """Those of the names or groups; all of them without any. Raises BenchError."""
    if not names:
        return list(images)
    known = {image.name for image in images} | {image.group for image in images}
    if unknown := [name for name in names if name not in known]:
        raise BenchError(
            f"there is no image {unknown[0]!r} in the list",
            hint=f"it has {', '.join(image.name for image in images)}",
        )
    return [image for image in images if image.name in names or image.group in names]
