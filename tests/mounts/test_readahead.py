"""The read-ahead of EROFS mounts of plain files."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from snapshotter.mounts import readahead
from snapshotter.mounts.capabilities import SAMPLE_LAYER, sample_image
from snapshotter.mounts.erofs import new_erofs

if TYPE_CHECKING:
    from collections.abc import Iterator

KIB = 772
ATTEMPTS = 50  # others may mount something at the same time


@pytest.fixture
def devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A stand-in for /sys/class/bdi, to make several mounts at once of."""
    monkeypatch.setattr(readahead, "_DEVICES", tmp_path)
    add(tmp_path, "erofs-1")
    add(tmp_path, "8:0")
    yield tmp_path
    for device in ("erofs-1", "8:0"):
        assert value(tmp_path, device) == "128"


def add(devices: Path, name: str) -> None:
    (devices / name).mkdir()
    (devices / name / "read_ahead_kb").write_text("128")


def value(devices: Path, name: str) -> str:
    return (devices / name / "read_ahead_kb").read_text()


@pytest.mark.root
def test_the_kernel_lists_the_mount_that_is_made(tmp_path: Path) -> None:
    image, layer = tmp_path / "image", tmp_path / "layer"
    image.write_bytes(sample_image())
    layer.write_bytes(SAMPLE_LAYER)
    for _ in range(ATTEMPTS):
        with readahead.read_ahead(KIB):
            tree = new_erofs(image, [layer])
        values = set()
        for path in Path("/sys/class/bdi").glob("erofs-*/read_ahead_kb"):
            with suppress(OSError):  # another one that has gone
                values.add(path.read_text())
        os.close(tree)
        if f"{KIB}\n" in values:
            return
    pytest.fail(f"none of {ATTEMPTS} mounts was found")


def test_the_one_that_appears_is_set(devices: Path) -> None:
    with readahead.read_ahead(KIB):
        add(devices, "erofs-2")
        add(devices, "8:16")
    assert (value(devices, "erofs-2"), value(devices, "8:16")) == (str(KIB), "128")


def test_of_two_none_is_set(devices: Path) -> None:
    with readahead.read_ahead(KIB):
        add(devices, "erofs-2")
        add(devices, "erofs-3")
    assert (value(devices, "erofs-2"), value(devices, "erofs-3")) == ("128", "128")


def test_a_mount_that_fails_sets_nothing(devices: Path) -> None:
    with pytest.raises(RuntimeError), readahead.read_ahead(KIB):
        raise RuntimeError
    with readahead.read_ahead(KIB):
        pass


def test_without_sys_nothing_is_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readahead, "_DEVICES", tmp_path / "none")
    with readahead.read_ahead(KIB):
        pass
