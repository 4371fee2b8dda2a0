"""Kills a process that works on snapshots before each of its steps on the disk, one after another.

Run as a program: `python -m tests.support.snapshot_crashes FOLDER SCENARIO`. For each step there
is a new root directory in FOLDER, and two processes: one does the scenario and is gone before the
step, the other recovers, checks, and does the scenario again. Prints how many steps there were.
"""

from __future__ import annotations

import os
import sqlite3
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from snapshotter.containerd.errors import AlreadyExistsError, NotFoundError
from snapshotter.containerd.snapshotter import Snapshotter
from tests.support.crashes import KILLED, Killer, in_child
from tests.support.lazy_images import DirectoryImages, digest, layer_labels

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

_MOST_STEPS = 200

LAZY = layer_labels("image", "layer", "chain")


async def prepare_container(snapshotter: Snapshotter) -> None:
    await snapshotter.prepare("new", "base", {"a": "1"})


async def view(snapshotter: Snapshotter) -> None:
    await snapshotter.view("new", "base", {})


async def commit(snapshotter: Snapshotter) -> None:
    await snapshotter.commit("committed", "active", {}, "")


async def prepare_lazy(snapshotter: Snapshotter) -> None:
    try:
        await snapshotter.prepare("extract", "base", LAZY)
    except AlreadyExistsError:
        await snapshotter.stat(digest("chain"))


async def remove(snapshotter: Snapshotter) -> None:
    await snapshotter.remove("active")
    await snapshotter.cleanup()


async def update(snapshotter: Snapshotter) -> None:
    await snapshotter.update("active", {"a": "2"}, ["labels.a"])


SCENARIOS = {
    work.__name__: work for work in (prepare_container, view, commit, prepare_lazy, remove, update)
}


async def begin(snapshotter: Snapshotter) -> None:
    """What is there before each scenario."""
    await snapshotter.prepare("extract base", "", {})
    await snapshotter.commit("base", "extract base", {}, "")
    await snapshotter.prepare("active", "base", {"a": "1"})
    snapshotter_fs = await snapshotter.mounts("active")
    upper = next(o for o in snapshotter_fs[0].options if o.startswith("upperdir="))
    tree = trio.Path(upper.removeprefix("upperdir=")) / "directory" / "inner"
    await tree.mkdir(parents=True)
    await (tree / "file").write_text("content")


async def check_whole(snapshotter: Snapshotter, root: Path) -> None:
    """Every directory has a snapshot and every snapshot its directory, with all that is in it."""
    found = {info.name: info for info in await snapshotter.list([])}
    expected = set()
    for name, info in found.items():
        if "containerd.io/snapshot/remote" in info.labels:
            continue
        record = snapshotter._metadata.record(name)
        has_work = {"work"} if info.kind.value == "active" else set()
        inside = set(os.listdir(root / "containerd" / "snapshots" / str(record.id)))
        assert inside - {"work"} == {"fs"}
        assert has_work <= inside
        expected.add(str(record.id))
    assert set(os.listdir(root / "containerd" / "snapshots")) == expected


async def repeat(snapshotter: Snapshotter, work: Callable[[Snapshotter], Awaitable[None]]) -> None:
    """The call was done, or can be done: not a third thing."""
    refused = False
    try:
        await work(snapshotter)
    except (AlreadyExistsError, NotFoundError):
        refused = True
    names = {info.name for info in await snapshotter.list([])}
    done = {
        "prepare_container": "new" in names,
        "view": "new" in names,
        "commit": "committed" in names and "active" not in names,
        "prepare_lazy": digest("chain") in names,
        "remove": "active" not in names,
        "update": "active" in names,
    }
    assert done[getattr(work, "__name__", "")], f"refused: {refused}"


def killer_of_statements(step: int) -> Killer:
    """One that counts what is said to SQLite, too."""
    killer = Killer(step)
    connect = sqlite3.connect

    def traced(*arguments: object, **options: object) -> sqlite3.Connection:
        connection = connect(*arguments, **options)  # type: ignore[call-overload]
        connection.set_trace_callback(lambda statement: killer.count())
        return connection  # type: ignore[no-any-return]

    sqlite3.connect = traced
    return killer


def crash(folder: Path, work: Callable[[Snapshotter], Awaitable[None]]) -> int:
    """How many steps `work` has, each of which it survived not being done."""
    for step in range(1, _MOST_STEPS):
        root = folder / str(step)

        def images(root: Path = root) -> DirectoryImages:
            images = DirectoryImages(root / "images")
            images.layers[digest("image")] = [digest("layer")]
            return images

        async def first(
            root: Path = root, step: int = step, images: Callable[[], DirectoryImages] = images
        ) -> None:
            killer = killer_of_statements(step)
            snapshotter = Snapshotter(root, images(), root / "idmapped")
            await begin(snapshotter)
            killer.arm()
            await work(snapshotter)

        async def second(root: Path = root, images: Callable[[], DirectoryImages] = images) -> None:
            served = images()
            snapshotter = Snapshotter(root, served, root / "idmapped")
            await snapshotter.recover()
            await check_whole(snapshotter, root)
            lazy = await snapshotter.list(['labels."containerd.io/snapshot/remote"'])
            assert sum(served.retained.values()) == len(lazy)
            await repeat(snapshotter, work)
            await snapshotter.cleanup()
            await check_whole(snapshotter, root)
            snapshotter.close()

        status = in_child(lambda first=first: trio.run(first))
        assert status in (0, KILLED), f"step {step}"
        assert in_child(lambda second=second: trio.run(second)) == 0, f"step {step}"
        if status == 0:
            return step - 1
    raise AssertionError(f"more than {_MOST_STEPS} steps")


if __name__ == "__main__":
    print(crash(Path(sys.argv[1]), SCENARIOS[sys.argv[2]]))
