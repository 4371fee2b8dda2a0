"""What this kernel can do for us, and what it has to learn of our FUSE mount: tried on tiny files.

They are in the mount only while they are tried, in slots that are theirs in every process.
"""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING

import trio

from index.errors import FirstByteError
from snapshotter.daemon.records import FIRST_SLOT
from snapshotter.fuse.flat import FlatFile
from snapshotter.fuse.view import View
from snapshotter.mounts.capabilities import (
    SAMPLE_LAYER,
    Capabilities,
    Sample,
    left_behind,
    probe,
    remove_left_behind,
    sample_image,
)
from snapshotter.mounts.errors import MountError

if TYPE_CHECKING:
    from pathlib import Path

    from snapshotter.daemon.places import Places
    from snapshotter.fuse.view import Views

log = logging.getLogger(__name__)

_SAMPLE = {".sample.erofs": sample_image(), ".sample.raw": SAMPLE_LAYER}
_PROBE_SECONDS = 30.0  # it takes 35 ms; a machine that starts is busy


class Kernel:
    """For the trio thread, when the FUSE mount is served."""

    def __init__(self, places: Places, views: Views) -> None:
        self._places = places
        self._views = views
        self._capabilities: Capabilities | None = None
        self._probing = trio.Lock()

    async def settle(self) -> None:
        """Let the kernel learn that we need not be told of files being closed (FLUSH).

        Once for the mount. Who closes a file waits for the answer, and cannot be killed meanwhile:
        a reader that is killed while no daemon runs would stay for as long.
        """
        slot, name = 1, next(iter(_SAMPLE))
        async with self._probing:
            view = _sample(slot, name)
            self._views.add(view)
            try:
                path = self._places.mount / name
                await trio.to_thread.run_sync(_open_and_close, path, abandon_on_cancel=True)
            finally:
                self._views.remove(view)

    async def clear(self, *, task_status: trio.TaskStatus[None]) -> None:
        """Remove what was left by daemons that were killed while they tried the kernel.

        It has started when what this daemon tries cannot be mistaken for that. What of it waits for
        the FUSE mount waits on, while this daemon is at work already.
        """
        root = self._places.root
        left = await trio.to_thread.run_sync(left_behind, root)
        task_status.started()
        for folder in left:
            log.info("removing %s, left by a daemon that was killed", folder)
            try:
                await trio.to_thread.run_sync(remove_left_behind, folder, abandon_on_cancel=True)
            except (MountError, OSError) as error:
                log.warning("%s is left: %s", folder, error)

    async def prepare(self) -> None:
        """Find out what the kernel can do before somebody waits for that: it takes some 0.1 s."""
        try:
            with trio.CancelScope(shield=True):  # or a mount of what is tried might be left
                await self.capabilities()
        except (FirstByteError, OSError, trio.TooSlowError) as error:
            log.warning("what the kernel can do is found out when it is needed: %s", error)

    async def capabilities(self) -> Capabilities:
        """What this kernel can do for us, tried once. For when the FUSE mount is served."""
        async with self._probing:
            if self._capabilities is None:
                samples = [_sample(slot, name) for slot, name in enumerate(_SAMPLE, 1)]
                for view in samples:
                    self._views.add(view)
                try:
                    sample = Sample(*(self._places.mount / name for name in _SAMPLE))
                    with trio.fail_after(_PROBE_SECONDS):
                        self._capabilities = await trio.to_thread.run_sync(
                            probe, self._places.root, sample, abandon_on_cancel=True
                        )
                finally:
                    for view in samples:
                        self._views.remove(view)
                log.info("the kernel: %s", self._capabilities)
        return self._capabilities


def _open_and_close(path: Path) -> None:
    os.close(os.open(path, os.O_RDONLY))


def _sample(slot: int, name: str) -> View:
    assert slot < FIRST_SLOT
    data = _SAMPLE[name]
    return View(
        name=name.encode(),
        slot=slot,
        reference="the sample of what the kernel can do",
        image=FlatFile(len(data), data),
        layers=(),
        raw_size=0,
    )
