"""The programs of docs/python.md run as they stand there."""

from __future__ import annotations

import gzip
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from tests.support.instance import firstbyte
from tests.support.layouts import write_layout
from tests.support.registry import RunningRegistry, skopeo_push
from tests.support.tars import file, tar

if TYPE_CHECKING:
    from tests.support.instance import Instance

PROGRAMS = re.findall(
    r"```python\n(.*?)```", (Path(__file__).parents[2] / "docs/python.md").read_text(), re.DOTALL
)


def run(program: str, directory: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_an_index_of_blobs(tmp_path: Path) -> None:
    (tmp_path / "base.tar.gz").write_bytes(gzip.compress(tar(file(b"etc/motd", b"old"))))
    (tmp_path / "app.tar.gz").write_bytes(gzip.compress(tar(file(b"etc/motd", b"newer"))))
    printed = run(PROGRAMS[0], tmp_path)
    assert printed.splitlines()[0].endswith(" 5")
    assert "layer 1 raw bytes 512 to 517" in printed
    assert "etc" in firstbyte("index", "ls", tmp_path / "image.fbx")


def test_images_in_registries(tmp_path: Path, registry: RunningRegistry, here: Instance) -> None:
    write_layout(tmp_path / "layout", [tar(file(b"motd", b"hello"))])
    skopeo_push(tmp_path / "layout", registry.reference("app", "1"))
    run(PROGRAMS[1].replace("localhost:5000", registry.host), tmp_path)
    for name in ("app:1", "app:1-zstd"):
        firstbyte("index", "verify", "--rebuild", f"{registry.host}/{name}")
    target = here.directory("tree")
    program = PROGRAMS[2].replace("localhost:5000/app:1", f"{registry.host}/app:1-zstd")
    places = f"config.Config(root={str(here.root)!r}, state={str(here.state)!r})"
    for name, path in (
        ("config.load(None)", f"config.decode(config.encode({places}))"),
        ("/mnt/app", target),
    ):
        assert name in program
        program = program.replace(name, str(path))
    assert run(program, tmp_path) == "serving\n"
    assert (target / "motd").read_bytes() == b"hello"
    here.succeed("umount", target)
