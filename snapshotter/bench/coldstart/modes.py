"""The ways to start an image that are compared."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from snapshotter.bench.coldstart import publishing
from snapshotter.bench.errors import BenchError

Runner = Literal["containerd", "podman"]
Store = Literal["", "image", "layer"]


@dataclass(frozen=True, slots=True)
class Mode:
    """`variant` is what is prepared in the registry; `lazy` is by FirstByte; `local` starts find
    everything on the node; without `background` only what is read is downloaded. A lazy podman uses
    a `store`. `containerd` is the socket of one that is not ours, or None, and `snapshotter` what
    it uses."""

    name: str
    runner: Runner = "containerd"
    lazy: bool = False
    local: bool = False
    background: bool = True
    variant: str = ""
    store: Store = ""
    snapshotter: str = ""
    containerd: Path | None = None

    @staticmethod
    def parse(text: str) -> Mode:
        """From its name, or SNAPSHOTTER@SOCKET. Raises BenchError."""
        if text in _BY_NAME:
            return _BY_NAME[text]
        name, _, socket = text.partition("@")
        if not name or not socket.startswith("/"):
            raise BenchError(
                f"there is no mode {text!r}",
                hint=f"choose of {', '.join(_BY_NAME)}; or name another snapshotter and the socket "
                "of its containerd, as stargz@/run/containerd/containerd.sock",
            )
        return Mode(text, snapshotter=name, containerd=Path(socket))


OVERLAYFS = Mode("overlayfs")
UNMODIFIED = Mode("firstbyte", lazy=True)
PROFILE = Mode("firstbyte-profile", lazy=True, variant=publishing.PROFILED)
NO_FILL = Mode("firstbyte-no-fill", lazy=True, background=False)
CONVERTED = Mode("firstbyte-converted", lazy=True, variant=publishing.CONVERTED)
LOCAL = Mode("local", local=True)
FIRSTBYTE_LOCAL = Mode("firstbyte-local", lazy=True, local=True)

PODMAN = Mode("podman", "podman")
IMAGE_STORE = Mode("podman-image-store", "podman", lazy=True, store="image")
IMAGE_STORE_PROFILE = Mode(
    "podman-image-store-profile", "podman", lazy=True, variant=publishing.PROFILED, store="image"
)
LAYER_STORE = Mode("podman-layer-store", "podman", lazy=True, store="layer")
PODMAN_LOCAL = Mode("podman-local", "podman", local=True)

STANDARD = (
    OVERLAYFS,
    UNMODIFIED,
    PROFILE,
    CONVERTED,
    NO_FILL,
    LOCAL,
    FIRSTBYTE_LOCAL,
    PODMAN,
    IMAGE_STORE,
    IMAGE_STORE_PROFILE,
    LAYER_STORE,
    PODMAN_LOCAL,
)
"""Those of containerd first."""

DEFAULT = (OVERLAYFS, UNMODIFIED, PROFILE, CONVERTED, LOCAL)

_BY_NAME = {mode.name: mode for mode in STANDARD}
_NORMAL: dict[Runner, Mode] = {"containerd": OVERLAYFS, "podman": PODMAN}
_LOCAL: dict[Runner, Mode] = {"containerd": LOCAL, "podman": PODMAN_LOCAL}


def normal_for(name: str) -> Mode:
    """What starts in a mode are compared with: a normal pull by the same runner."""
    return _NORMAL[_runner(name)]


def local_for(name: str) -> Mode:
    """Starts of the same runner that fetch nothing."""
    return _LOCAL[_runner(name)]


def _runner(name: str) -> Runner:
    return _BY_NAME[name].runner if name in _BY_NAME else "containerd"
