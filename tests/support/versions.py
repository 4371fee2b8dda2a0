"""Two versions of the program, each in a virtual environment of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]

EARLIER = os.environ.get("FIRSTBYTE_EARLIER", "015b744")
"""The commit whose records and sessions the program of today must understand: the first that left
any to a successor under a service manager. A release's tag will stand here."""


@dataclass(frozen=True)
class Installed:
    """A copy of the program; `python` is its interpreter."""

    place: Path
    python: Path

    def remove(self) -> None:
        """As the upgrade after the next one does."""
        shutil.rmtree(self.place)


def install_earlier(place: Path) -> Installed:
    """The program as of the commit EARLIER, which the history has to reach back to."""
    (place / "program").mkdir(parents=True)
    archive = subprocess.run(
        ["git", "-C", REPOSITORY, "archive", EARLIER, "index", "snapshotter"],
        capture_output=True,
        check=False,
    )
    if archive.returncode:
        pytest.fail(
            f"there is no earlier version to upgrade from: {_why_not(archive.stderr)}",
            pytrace=False,
        )
    subprocess.run(["tar", "-x", "-C", place / "program"], input=archive.stdout, check=True)
    return _installed(place)


def _why_not(complaint: bytes) -> str:
    """Why git does not give us EARLIER, and what to do about it."""
    shallow = subprocess.run(
        ["git", "-C", REPOSITORY, "rev-parse", "--is-shallow-repository"],
        capture_output=True,
        check=False,
    )
    if shallow.stdout.strip() == b"true":
        return f"this clone does not go back to {EARLIER}; run git fetch --unshallow"
    said = complaint.decode(errors="replace").strip()
    return f"{said}; name a commit of this repository's history in FIRSTBYTE_EARLIER"


def install_current(place: Path) -> Installed:
    """The program of this working copy."""
    for package in ("index", "snapshotter"):
        shutil.copytree(
            REPOSITORY / package,
            place / "program" / package,
            ignore=shutil.ignore_patterns("__pycache__"),
        )
    return _installed(place)


def _installed(place: Path) -> Installed:
    """With the Python packages of the environment that the tests run in."""
    venv = place / "venv"
    command = ["/usr/bin/python3", "-m", "venv", "--without-pip", venv]
    subprocess.run(command, check=True)
    (library,) = venv.glob("lib/python*/site-packages")
    paths = f"{place / 'program'}\n{sysconfig.get_path('purelib')}\n"
    (library / "firstbyte.pth").write_text(paths)
    return Installed(place, venv / "bin" / "python")
