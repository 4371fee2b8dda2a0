"""The demo's image, made once for all workers of a run: it takes 15 seconds of a processor."""

from __future__ import annotations

import fcntl
import os
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from snapshotter.demo import image
from snapshotter.demo.layout import Layer

if TYPE_CHECKING:
    from pathlib import Path

    import pytest


@dataclass(frozen=True, slots=True)
class Sample:
    """The image in a layout, under the demo's tag, and unpacked by umoci; not to be changed."""

    layout: Path
    root: Path
    layers: tuple[Layer, ...]


def sample(factory: pytest.TempPathFactory) -> Sample:
    """Make it, or wait for whoever makes it."""
    base = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    layout, bundle, done = (base / "sample" / name for name in ("layout", "bundle", "layers.json"))
    with (base / "sample.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            layers = image.build(layout, lambda: None)
            unpack = ["umoci", "unpack", "--image", f"{layout}:{image.TAG}", bundle]
            subprocess.run(unpack, check=True, capture_output=True)
            done.write_bytes(msgspec.json.encode(layers))
    found = msgspec.json.decode(done.read_bytes(), type=tuple[Layer, ...])
    return Sample(layout, bundle / "rootfs", found)
