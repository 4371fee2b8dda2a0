"""The Debian packages installed on this machine: what they need, and which files are theirs."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from snapshotter.demo.errors import DemoError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

_SECONDS = 60.0  # dpkg-query answers in 0.1 s

# One line a package, as deb-control(5) has the fields.
_FORMAT = "${db:Status-Status}\t${Package}\t${Provides}\t${Pre-Depends}, ${Depends}\n"

_NAME = re.compile(r"[a-z0-9][a-z0-9+.-]+")


@dataclass(frozen=True)
class Packages:
    """`needs` gives for each package its dependencies, each a list of names of which one will do.
    `providers` gives for each virtual package one that provides it."""

    needs: Mapping[str, Sequence[Sequence[str]]]
    providers: Mapping[str, str]

    @classmethod
    def installed(cls) -> Self:
        """Those of this machine; raises DemoError if it has no dpkg."""
        return cls.parse(_dpkg_query("--show", "--showformat", _FORMAT))

    @classmethod
    def parse(cls, text: str) -> Self:
        """From lines of status, name, what is provided and what is needed, parted by tabs."""
        needs: dict[str, list[list[str]]] = {}
        providers: dict[str, str] = {}
        for line in text.splitlines():
            status, package, provided, needed = line.split("\t")
            if status != "installed":
                continue
            needs[package] = [_names(group, "|") for group in needed.split(",") if group.strip()]
            for name in _names(provided, ","):
                providers.setdefault(name, package)
        return cls(needs, providers)

    def closure(self, roots: Iterable[str], *, without: Iterable[str] = ()) -> list[str]:
        """The `roots` and all that they need, except `without` and names that are not installed."""
        found: set[str] = set(without)
        added: set[str] = set()
        waiting = list(roots)
        while waiting:
            package = self._installed_name(waiting.pop())
            if package is None or package in found:
                continue
            found.add(package)
            added.add(package)
            for group in self.needs[package]:
                waiting.extend([name for name in group if self._installed_name(name)][:1])
        return sorted(added)

    def _installed_name(self, name: str) -> str | None:
        return name if name in self.needs else self.providers.get(name)


def files_of(packages: Sequence[str]) -> list[str]:
    """The absolute paths that belong to the packages, as dpkg names them, sorted.

    Some may not exist: machines can be told not to unpack documentation.
    """
    lines = _dpkg_query("--listfiles", *packages).splitlines()
    return sorted({line for line in lines if line.startswith("/") and line != "/."})


def _names(group: str, separator: str) -> list[str]:
    """`libc6 (>= 2.36) | libc6.1:any` gives both names, without versions and architectures."""
    matches = (_NAME.match(part.strip()) for part in group.split(separator))
    return [match[0] for match in matches if match]


def _dpkg_query(*arguments: str) -> str:
    try:
        answer = subprocess.run(
            ["dpkg-query", *arguments],
            capture_output=True,
            check=True,
            timeout=_SECONDS,
            text=True,
            errors="surrogateescape",
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise DemoError(
            f"cannot read which packages are installed: {error}",
            hint="the sample image is made on Debian only: give an image of your own instead",
        ) from error
    return answer.stdout
