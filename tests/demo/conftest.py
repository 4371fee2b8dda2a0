"""What most of these tests start from."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from snapshotter.demo.interruption import Interruption
from snapshotter.demo.workspace import Workspace
from tests.support.rootfs import make_rootfs

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def workspace() -> Iterator[Workspace]:
    """A workspace that has to close without complaint, and to leave nothing."""
    warnings: list[str] = []
    with Interruption() as interruption, Workspace(interruption, warnings.append) as workspace:
        yield workspace
    assert warnings == []
    assert not workspace.path.exists()


@pytest.fixture(scope="session")
def rootfs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small root file system; not to be changed."""
    return make_rootfs(tmp_path_factory.mktemp("rootfs") / "root")
