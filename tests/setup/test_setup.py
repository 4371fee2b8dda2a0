"""The set-up script, in a copy of its own with packages that nobody has."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

REPOSITORY = Path(__file__).parents[2]
NOBODY = 65534
SECONDS = 60


@pytest.fixture
def copy() -> Iterator[Path]:
    """The files that the set-up is made of, where everybody can read them."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory)
        path.chmod(0o755)
        for name in ("Makefile", "pyproject.toml"):
            shutil.copy(REPOSITORY / name, path)
        shutil.copytree(REPOSITORY / "scripts", path / "scripts")
        yield path


def setup(copy: Path, *groups: str, user: int | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [copy / "scripts/setup", *groups],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
        user=user,
    )


def test_without_root_one_line_says_which_packages_to_install(copy: Path) -> None:
    (copy / "scripts/packages/program").write_text("# a comment\nbash\nno-such-package\n")
    result = setup(copy, "program", user=NOBODY)
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert "apt-get install no-such-package'" in line
    assert not (copy / ".venv").exists()


def test_a_package_that_another_one_provides_is_not_missing(copy: Path) -> None:
    # gcc provides c-compiler; no package has that name.
    (copy / "scripts/packages/program").write_text("c-compiler\nno-such-package\n")
    assert "apt-get install no-such-package'" in setup(copy, "program", user=NOBODY).stderr


def test_an_unknown_group_is_refused(copy: Path) -> None:
    result = setup(copy, "programme")
    assert result.returncode == 1
    assert "no such group: programme" in result.stderr


def test_a_second_set_up_waits_for_the_first(copy: Path) -> None:
    lock = os.open(copy, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    with subprocess.Popen(
        [copy / "scripts/setup", "programme"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as second:
        assert second.stdout
        assert b"waiting" in second.stdout.readline()
        assert second.poll() is None
        os.close(lock)
        assert second.wait(SECONDS) == 1


def test_a_set_up_that_is_current_does_nothing(copy: Path) -> None:
    """The stamp is what the first run leaves behind; here it is written by hand."""
    (copy / "scripts/packages/program").write_text("bash\n")
    program = copy / ".venv/bin/firstbyte"
    program.parent.mkdir(parents=True)
    program.write_text("")
    program.chmod(0o755)
    version = subprocess.run(["/usr/bin/python3", "--version"], capture_output=True, check=True)
    parts = [f"program\n{copy.resolve()}\n".encode(), version.stdout]
    parts += [(copy / name).read_bytes() for name in ("pyproject.toml", "scripts/setup")]
    key = hashlib.sha256(b"".join(parts)).hexdigest()
    (copy / ".venv/setup-program").write_text(f"{key}  -")

    before = sorted((path, path.lstat().st_mtime_ns) for path in copy.rglob("*"))
    result = setup(copy, "program")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert sorted((path, path.lstat().st_mtime_ns) for path in copy.rglob("*")) == before


def test_make_lists_its_targets(copy: Path) -> None:
    listed = subprocess.run(
        ["make", "-C", copy, "--no-print-directory"], capture_output=True, text=True, check=True
    ).stdout
    (phony,) = re.findall(r"^\.PHONY: (.*)$", (copy / "Makefile").read_text(), re.MULTILINE)
    assert [line.split()[1] for line in listed.splitlines()] == phony.split()
