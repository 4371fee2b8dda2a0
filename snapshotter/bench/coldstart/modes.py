"""The ways to start an image that are compared."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Self

from snapshotter.bench.coldstart import publishing
from snapshotter.bench.errors import BenchError


@dataclass(frozen=True, slots=True)
class Mode:
    """`variant` is what is prepared in the registry; `lazy` is by FirstByte; `local` starts find
    everything on the node. `containerd` is the socket of one that is not ours, or None."""

    name: str
    lazy: bool = False
    local: bool = False
    variant: str = ""
    snapshotter: str = "overlayfs"
    containerd: Path | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """From its name, or SNAPSHOTTER@SOCKET. Raises BenchError."""
        for mode in STANDARD:
            if mode.name == text:
                return cls(mode.name, lazy=mode.lazy, local=mode.local, variant=mode.variant)
        name, _, socket = text.partition("@")
        if not name or not socket.startswith("/"):
            raise BenchError(
                f"there is no mode {text!r}",
                hint=f"choose of {', '.join(mode.name for mode in STANDARD)}; or name another "
                "snapshotter and the socket of its containerd, as "
                "stargz@/run/containerd/containerd.sock",
            )
        return cls(text, snapshotter=name, containerd=Path(socket))


OVERLAYFS = Mode("overlayfs")
UNMODIFIED = Mode("firstbyte", lazy=True)
PROFILE = Mode("firstbyte-profile", lazy=True, variant=publishing.PROFILED)
CONVERTED = Mode("firstbyte-converted", lazy=True, variant=publishing.CONVERTED)
LOCAL = Mode("local", local=True)
FIRSTBYTE_LOCAL = Mode("firstbyte-local", lazy=True, local=True)

STANDARD = (OVERLAYFS, UNMODIFIED, PROFILE, CONVERTED, LOCAL, FIRSTBYTE_LOCAL)
