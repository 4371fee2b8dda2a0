"""One image at one directory: its states, and which may follow which."""

from __future__ import annotations

import enum
import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import trio

if TYPE_CHECKING:
    from pathlib import Path

    from snapshotter.daemon.open_image import OpenImage
    from snapshotter.daemon.showing import Mode

log = logging.getLogger(__name__)


class MountState(enum.Enum):
    """Where in its life a mount is."""

    PREPARING = "preparing"  # the image is being found and opened; the directory is still empty
    SERVING = "serving"  # mounted; what is read is fetched
    LOCAL = "local"  # mounted, and every chunk is on this node; some may be evicted later
    QUARANTINED = "quarantined"  # mounted, but reads fail: its file index has lied about it
    GONE = "gone"


_MAY_BECOME = {
    MountState.PREPARING: {MountState.SERVING, MountState.GONE},
    MountState.SERVING: {MountState.LOCAL, MountState.QUARANTINED, MountState.GONE},
    MountState.LOCAL: {MountState.SERVING, MountState.GONE},
    MountState.QUARANTINED: {MountState.GONE},
    MountState.GONE: set[MountState](),
}


@dataclass(eq=False)
class Mount:
    """A mount, from the moment its directory is claimed.

    `image` and `mode` are None while it is being found, `why` says why the mode is no better.
    `ended_serving` is set when the state is one that comes after SERVING for the first time,
    `forgotten` when nothing of it is left on disk. `watching` is the scope of the task that notices
    what becomes of it.
    """

    target: Path
    reference: str
    state: MountState = MountState.PREPARING
    image: OpenImage | None = None
    mode: Mode | None = None
    why: str = ""
    ended_serving: trio.Event = field(default_factory=trio.Event)
    forgotten: trio.Event = field(default_factory=trio.Event)
    watching: trio.CancelScope = field(default_factory=trio.CancelScope)

    def become(self, state: MountState) -> None:
        """Go to another state; this is the only place that does."""
        assert state in _MAY_BECOME[self.state], (self.state, state)
        log.info("%s at %s is %s", self.reference, self.target, state.value)
        self.state = state
        if state is not MountState.SERVING:
            self.ended_serving.set()
