"""A corpus that is measured in no time."""

from __future__ import annotations

import random
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from snapshotter.bench import corpus
from snapshotter.bench.images import FORMS, GZIP, StoredImage, write_image
from snapshotter.demo.interruption import Interruption
from snapshotter.demo.workspace import Workspace
from tests.support.layouts import write_layout
from tests.support.rootfs import as_layer, make_rootfs

if TYPE_CHECKING:
    from collections.abc import Iterator

SMALL_FILES = 40
CATALOGUE = """
[[image]]
name = "tiny"
reference = "oci:{layout}:tiny"
command = ["sh", "-c", "cat /bin/cat >/dev/null; echo ready; sleep 600"]
ready = {{ line = '^ready$' }}
within = 60.0
"""


@pytest.fixture(scope="session")
def directory() -> Iterator[Path]:
    """An empty directory with a short path: sockets need that."""
    with tempfile.TemporaryDirectory(prefix="fb-") as path:
        yield Path(path)


@pytest.fixture(scope="session")
def tree(directory: Path) -> Path:
    """Small files in two directories, a large one, a symbolic link."""
    root = directory / "corpus"
    rng = random.Random(1)
    for number in range(SMALL_FILES):
        path = root / f"part-{number % 2}" / f"file-{number}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"the same line\n" * rng.randrange(200))
    (root / "large").write_bytes(rng.randbytes(3 << 20))
    (root / "link").symlink_to("large")
    return root


@pytest.fixture(scope="session")
def layers(directory: Path, tree: Path) -> tuple[corpus.RawLayer, ...]:
    return corpus.pack([tree], None, directory)


@pytest.fixture(scope="session")
def images(directory: Path, layers: tuple[corpus.RawLayer, ...]) -> list[StoredImage]:
    """One image for each form."""
    return [
        write_image(directory / f"image-{number}", form, layers)
        for number, form in enumerate(FORMS)
    ]


@pytest.fixture(scope="session")
def image(images: list[StoredImage]) -> StoredImage:
    return images[FORMS.index(GZIP)]


@pytest.fixture(scope="session")
def catalogue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A list with one image."""
    directory = tmp_path_factory.mktemp("images")
    root = make_rootfs(directory / "root")
    config = {"config": {"Env": ["PATH=/bin"], "Cmd": ["sh"]}}
    write_layout(directory / "layout", [as_layer(root)], tag="tiny", config=config)
    path = directory / "images.toml"
    path.write_text(CATALOGUE.format(layout=directory / "layout"))
    return path


@pytest.fixture
def workspace() -> Iterator[Workspace]:
    """Nothing is left of it."""
    with Interruption() as interruption, Workspace(interruption, print) as workspace:
        yield workspace


@pytest.fixture
def workplace(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where workspaces are made; nothing may be left in it. On a disk, with a short path."""
    with tempfile.TemporaryDirectory(prefix="fb-", dir="/var/tmp") as directory:
        monkeypatch.setenv("TMPDIR", directory)
        yield Path(directory)
        assert list(Path(directory).iterdir()) == []
