"""How long readers wait while one daemon follows another, and what a daemon with many images needs.

One image is read without any cache, every millisecond, in mode `fuse`; the others are made up,
large, and merely mounted, as on a node with many containers.
"""

from __future__ import annotations

import mmap
import os
import random
import signal
import statistics
import time
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from snapshotter.bench import corpus
from snapshotter.bench.errors import BenchError
from snapshotter.bench.images import ZSTD_FRAMES, write_image
from snapshotter.bench.mounting import silent_registry, take_in
from snapshotter.bench.node import running_node
from snapshotter.bench.tables import Cell, Table
from snapshotter.bench.timing import fork

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from snapshotter.bench.node import Node
    from snapshotter.demo.workspace import Workspace

SETTLE = 0.5
"""Seconds of reading before and after each change."""

_SIZE = 32 << 20  # bytes of the file that is read
_PAGE = 4096
_PAUSE = 0.001  # seconds between two reads
_NOTABLE = 0.002  # seconds of a read from which on it is noted
_SEED = 1


def handover(workspace: Workspace, images: int, files: int, samples: int) -> list[Table]:
    """Replace and kill the daemon of `images` images with so many `files` in all, `samples` times.

    Needs root. Raises BenchError if a read fails or gives other bytes.
    """
    directory = workspace.directory("handover")
    content = random.Random(_SEED).randbytes(_SIZE)  # noqa: S311  (made-up data)
    folder = directory / "content"
    folder.mkdir()
    (folder / "file").write_bytes(content)
    image = write_image(directory / "image", ZSTD_FRAMES, corpus.pack([folder], None, directory))
    rows: list[tuple[Cell, ...]] = []
    with silent_registry() as host, running_node(workspace, "node-handover") as node:
        before = node.memory()
        _mount_others(node, host, directory, images - 1, files // max(images - 1, 1))
        read = directory / "read"
        read.mkdir()
        node.show(image.reference, read, wait_local=True, mode="fuse")
        after = node.memory()
        (path,) = read.rglob("file")
        changes: tuple[tuple[str, Callable[[], None]], ...] = (
            ("replaced (daemon --replace)", node.replace),
            ("killed (SIGKILL), and started at once", node.restart),
        )
        with _reader(path, content, directory / "reads") as stalls:
            rows += [_measure(what, change, samples, stalls) for what, change in changes]
        later = node.memory()
    return [
        Table(
            "How long readers wait while one daemon follows another",
            ("the daemon is", "times", "median ms", "longest ms", "until it answers again ms"),
            tuple(rows),
            f"{images} images with {files} files in all. One file of an image that is all here is "
            "read all the time, 4 KiB at a time, past the page cache, in mode fuse; each number is "
            "the longest read of one change. The last column is the median time from the command "
            "to an answer of the new daemon on its socket.",
        ),
        Table(
            "Memory of a daemon with many images",
            ("daemon", "resident MB", "private MB"),
            (
                ("without images", *before),
                (f"{images} images, {files} files, just mounted", *after),
                ("the same, restored by a successor", *later),
            ),
            "Private is what is no mapped file. Made-up images are mounted in mode erofs.",
        ),
    ]


def _mount_others(node: Node, host: str, directory: Path, images: int, files: int) -> None:
    """Mount made-up images, each another one."""
    for number in range(images):
        target = directory / f"mounted-{number}"
        target.mkdir()
        place = directory / f"image-{number}"
        reference = take_in(node, files + number, place, target, host)
        node.show(reference, target, wait_local=False, mode="erofs")


def _measure(
    what: str, change: Callable[[], None], samples: int, stalls: Callable[[float, float], float]
) -> tuple[Cell, ...]:
    waits, answers = [], []
    for _ in range(samples):
        time.sleep(SETTLE)
        begin = time.monotonic()
        change()
        answers.append(time.monotonic() - begin)
        time.sleep(SETTLE)
        waits.append(stalls(begin, time.monotonic()))
    median, longest = 1e3 * statistics.median(waits), 1e3 * max(waits)
    return what, samples, median, longest, 1e3 * statistics.median(answers)


@contextmanager
def _reader(path: Path, content: bytes, notes: Path) -> Iterator[Callable[[float, float], float]]:
    """Read a file over and over in a process of its own.

    Yields what tells the seconds that the longest read between two times (time.monotonic) took.
    """
    notes.touch()
    parent = os.getpid()
    child = fork()
    if not child:
        status = 1
        try:
            _read(path, content, notes, parent)
        except Exception as error:
            notes.write_text(f"failed: {error}")
        finally:
            os._exit(status)

    def longest(begin: float, end: float) -> float:
        if os.waitpid(child, os.WNOHANG)[0]:
            raise BenchError(
                "a read failed while a daemon followed another", hint=notes.read_text()[-500:]
            )
        reads = [tuple(map(float, line.split())) for line in notes.read_text().splitlines()]
        return max(
            (took for began, took in reads if began < end and began + took > begin),
            default=_NOTABLE,
        )

    try:
        yield longest
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def _read(path: Path, content: bytes, notes: Path, parent: int) -> None:
    """As long as this process has its parent: verify pages at random, and note when a read took
    long. Raises BenchError."""
    rng = random.Random(_SEED)  # noqa: S311  (a measurement)
    with ExitStack() as stack:
        file = os.open(path, os.O_RDONLY | os.O_DIRECT)
        stack.callback(os.close, file)
        page = stack.enter_context(mmap.mmap(-1, _PAGE))  # direct reads want whole pages
        out = stack.enter_context(notes.open("a", buffering=1))
        while os.getppid() == parent:
            offset = rng.randrange(_SIZE // _PAGE) * _PAGE
            began = time.monotonic()
            if os.preadv(file, [page], offset) != _PAGE or page[:] != content[offset:][:_PAGE]:
                raise BenchError(f"wrong bytes at {offset} of {path}")
            took = time.monotonic() - began
            if took > _NOTABLE:
                out.write(f"{began} {took}\n")
            time.sleep(_PAUSE)
