"""Real FUSE mounts of made-up trees, served by a thread of the test's own process."""

from __future__ import annotations

import stat
import threading
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import trio

from index.erofs.reader import Image
from index.erofs.writer import write
from index.errors import FirstByteError
from index.tree import Extent, Node
from snapshotter.fuse import session
from snapshotter.fuse.operations import Operations
from snapshotter.fuse.view import View, Views

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

STARTING_SECONDS = 20
pyfuse3_is_busy = threading.Event()


@dataclass
class MemoryLayer:
    """A layer whose raw space is in memory.

    Where `local` is false the bytes have to be fetched; `failing` says that fetching fails.
    """

    data: bytes = b""
    local: bool = True
    failing: bool = False
    fetches: list[tuple[int, int]] = field(default_factory=list)

    def read_now(self, offset: int, length: int) -> bytes | None:
        return self.data[offset : offset + length] if self.local else None

    async def read(self, offset: int, length: int) -> bytes:
        self.fetches.append((offset, length))
        await trio.lowlevel.checkpoint()
        if self.failing:
            raise FirstByteError("the registry is away")
        return self.data[offset : offset + length]


def directory(children: dict[bytes, Node], *, mode: int = 0o755) -> Node:
    """A directory with the link count that its subdirectories give it."""
    subdirectories = sum(child.is_dir for child in children.values())
    return Node(stat.S_IFDIR | mode, nlink=2 + subdirectories, children=children)


def regular(size: int, *extents: Extent, mode: int = 0o644) -> Node:
    return Node(stat.S_IFREG | mode, size=size, extents=extents)


def packed(contents: dict[bytes, bytes]) -> tuple[dict[bytes, Node], bytes]:
    """Files of one layer, and that layer's raw space: each file starts a 512-byte block."""
    raw = bytearray()
    files: dict[bytes, Node] = {}
    for name, content in contents.items():
        extents = [Extent(0, 0, len(raw), len(content))] if content else []
        files[name] = regular(len(content), *extents)
        raw += content + bytes(-len(content) % 512)
    return files, bytes(raw)


def view_of(
    root: Node, layers: Sequence[MemoryLayer], *, slot: int = 1, name: bytes = b"image"
) -> View:
    sizes = [len(layer.data) for layer in layers]
    return View(
        name=name,
        slot=slot,
        reference=f"example/{name.decode()}",
        image=Image(write(root, sizes)),
        layers=layers,
        raw_size=sum(sizes),
    )


@dataclass
class Served:
    """A mount that a thread is serving. Views may be changed through `run`."""

    mountpoint: Path
    views: Views
    token: trio.lowlevel.TrioToken
    serving: list[trio.CancelScope]
    started: threading.Event

    def succeed(self) -> None:
        """Serve anew, as a process does that takes the mount over from one that has ended."""
        self.started.clear()
        trio.from_thread.run_sync(self.serving[-1].cancel, trio_token=self.token)
        assert self.started.wait(STARTING_SECONDS)

    def forget(self, name: bytes) -> None:
        """Drop the kernel's memory of a view, as the daemon does after removing one."""
        trio.from_thread.run_sync(session.forget_name, name, trio_token=self.token)


@contextmanager
def served(mountpoint: Path, *views: View) -> Iterator[Served]:
    """Mount these views at `mountpoint` until the block ends, or raise what the session raises."""
    assert not pyfuse3_is_busy.is_set(), "a process can serve one mount at a time"
    pyfuse3_is_busy.set()
    registry = Views()
    for view in views:
        registry.add(view)
    started = threading.Event()
    outcome: list[BaseException] = []
    scope = trio.CancelScope()
    tokens: list[trio.lowlevel.TrioToken] = []
    turns: list[trio.CancelScope] = []

    async def serve() -> None:
        tokens.append(trio.lowlevel.current_trio_token())
        with scope:
            connection = session.open_mount(mountpoint)
            try:
                resumed = False
                while True:
                    with trio.CancelScope() as turn:
                        turns.append(turn)
                        async with trio.open_nursery() as nursery:
                            serving = partial(session.serve, resumed=resumed)
                            await nursery.start(
                                serving, Operations(registry), connection, mountpoint
                            )
                            started.set()
                    if not turn.cancelled_caught:
                        break
                    resumed = True
            finally:
                session.close_mount(connection, mountpoint)

    def run() -> None:
        try:
            trio.run(serve)
        except BaseException as error:
            outcome.append(error)
        finally:
            started.set()

    thread = threading.Thread(target=run)
    thread.start()
    assert started.wait(STARTING_SECONDS)
    try:
        if thread.is_alive():
            yield Served(mountpoint, registry, tokens[0], turns, started)
    finally:
        with suppress(trio.RunFinishedError):  # it may end by itself
            trio.from_thread.run_sync(scope.cancel, trio_token=tokens[0])
        thread.join(STARTING_SECONDS)
        pyfuse3_is_busy.clear()
        assert not thread.is_alive()
    if outcome:
        error = outcome[0]
        while isinstance(error, BaseExceptionGroup):  # nurseries wrap
            error = error.exceptions[0]
        raise error
