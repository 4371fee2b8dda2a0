"""Modules that a Python program will import are known before it runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from snapshotter.images import python_modules
from tests.support.elves import make_elf
from tests.support.foreseeing import foreseen
from tests.support.tars import symlink

if TYPE_CHECKING:
    from tests.support.fetching import Node

LIBRARY = Path(sysconfig.get_path("stdlib"))
SITE = "usr/lib/python3.11/site-packages"
FILES = {
    "usr/bin/python3.11": make_elf(),
    "usr/lib/python3.11/site.py": b"import os",
    "usr/lib/python3.11/os.py": b"import nothing_of_that_name",
    "usr/lib/python3.11/__pycache__/os.cpython-311.pyc": b"compiled",
    "usr/lib/python3.11/runpy.py": b"",
    "usr/lib/python3.11/unused.py": b"",
    f"{SITE}/pack/__init__.py": b"from .inner import one",
    f"{SITE}/pack/inner/__init__.py": b"from .. import two",
    f"{SITE}/pack/inner/one.py": b"import pack.native",
    f"{SITE}/pack/two.py": b"from ..... import three",
    f"{SITE}/pack/three.py": b"",
    f"{SITE}/pack/native.cpython-311-x86_64-linux-gnu.so": make_elf(needed=[b"libown.so"]),
    f"{SITE}/pack/native.py": b"",
    "usr/lib/libown.so": make_elf(),
    "usr/lib/python3/dist-packages/debian.py": b"",
    "srv/app.py": b"import pack\nimport beside",
    "srv/beside.py": b"",
    "srv/made.py": b"import debian",
    "opt/venv/lib/python3.11/site-packages/virtual.py": b"",
    "usr/bin/tool": b"#!/usr/bin/python3.11\nfrom pack import inner\n",
}
PYTHON = [
    "/usr/bin/python3.11",
    "/usr/lib/python3.11/__pycache__/os.cpython-311.pyc",
    "/usr/lib/python3.11/site.py",
]
PACK = [
    f"/{SITE}/pack/__init__.py",
    f"/{SITE}/pack/inner/__init__.py",
    f"/{SITE}/pack/inner/one.py",
    f"/{SITE}/pack/native.cpython-311-x86_64-linux-gnu.so",
    f"/{SITE}/pack/two.py",
    "/usr/lib/libown.so",
]
RUN = "/usr/lib/python3.11/runpy.py"


async def test_what_the_interpreter_reads_besides_modules(node: Node) -> None:
    """What converts to its locale, and what `site` runs."""
    others = {
        "usr/lib/x86_64-linux-gnu/gconv/gconv-modules.cache": b"conversions",
        f"{SITE}/setup.pth": b"import unused; unused.run()\n/somewhere/else\n",
        "usr/lib/python3.11/not.pth": b"import site",
    }
    found = await foreseen(node, FILES | others, cmd=["python3.11"])
    expected = [*PYTHON, *map("/{}".format, others), "/usr/lib/python3.11/unused.py"]
    expected.remove("/usr/lib/python3.11/not.pth")
    assert found == sorted(expected)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["python3.11"], []),
        (["python3.11", "/srv/app.py"], ["/srv/app.py", "/srv/beside.py", *PACK]),
        (["python3.11", "-m", "pack.inner"], [RUN, *PACK]),
        (["python3.11", "-c", "import pack.three"], [*PACK, f"/{SITE}/pack/three.py"]),
        (["tool"], ["/usr/bin/tool", *PACK]),
        (
            ["tool", "-b", "0.0.0.0:80", "made:app"],
            ["/usr/bin/tool", *PACK, "/srv/made.py", "/usr/lib/python3/dist-packages/debian.py"],
        ),
    ],
    ids=lambda value: " ".join(value)[:40],
)
async def test_what_is_run_brings_what_it_imports(
    node: Node, words: list[str], expected: list[str]
) -> None:
    found = await foreseen(node, FILES, entrypoint=words, working_dir="/srv")
    assert found == sorted({*PYTHON, *expected})


async def test_a_virtual_environment_has_modules_of_its_own(node: Node) -> None:
    link = symlink(b"opt/venv/bin/python", b"/usr/bin/python3.11")
    command = ["/opt/venv/bin/python", "-c", "import virtual"]
    found = await foreseen(node, FILES, link, cmd=command)
    assert found == sorted([*PYTHON, "/opt/venv/lib/python3.11/site-packages/virtual.py"])


async def test_modules_are_found_where_the_environment_says(node: Node) -> None:
    found = await foreseen(
        node, FILES, cmd=["python3.11", "-c", "import beside"], env=["PYTHONPATH=/nowhere:/srv"]
    )
    assert found == sorted([*PYTHON, "/srv/beside.py"])


async def test_there_is_an_end_to_what_is_looked_for(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(python_modules, "MAX_NAMES", 10)
    names = ", ".join(f"absent{number}" for number in range(20))
    found = await foreseen(node, FILES, cmd=["python3.11", "-c", f"import {names}, pack"])
    assert f"/{SITE}/pack/__init__.py" not in found


OTHERS = set(LIBRARY.glob("[w-z]*.py"))  # most of which it does not load
CODE = """import json, sys
print(json.dumps([one.__spec__.origin for one in sys.modules.values() if one.__spec__]))"""


@pytest.fixture
def loaded() -> set[Path]:
    """What of the standard library this machine's Python loads to run CODE."""
    shown = subprocess.run(
        [os.path.realpath(sys.executable), "-I", "-S", "-c", CODE],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    paths = {Path(path) for path in json.loads(shown) if path}
    return {path for path in paths if path.suffix == ".py" and path.is_relative_to(LIBRARY)}


async def test_a_real_python_imports_nothing_that_was_not_foreseen(
    node: Node, loaded: set[Path]
) -> None:
    version = f"python3.{sys.version_info.minor}"
    names = {path: f"usr/lib/{version}/{path.relative_to(LIBRARY)}" for path in loaded | OTHERS}
    files = {name: path.read_bytes() for path, name in names.items()}
    files[f"usr/bin/{version}"] = make_elf()
    found = await foreseen(node, files, cmd=[version, "-c", CODE])
    assert len(loaded) > 5
    assert {f"/{names[path]}" for path in loaded} <= set(found)
    assert len(found) < len(files)
