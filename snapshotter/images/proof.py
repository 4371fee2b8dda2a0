"""Proving that a file index tells the truth about its image's tree.

The chunks of a fully local image are proven by the layers' diffIDs. Its names, modes and owners
come from the file index alone, which may be somebody else's word. Building is deterministic, so
the tree that the local layers give must be the index's, byte for byte.

Merging a large image takes seconds of Python, during which a thread of the daemon would hold up
its file system: it is done in a process of its own, at a low priority.
"""

from __future__ import annotations

import mmap
import os
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from index.erofs import writer
from index.errors import FirstByteError, IntegrityError
from index.file import FileIndex
from index.merge import Merger
from index.tar import TarScanner

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from index.entry import Entry

_PIECE = 64 << 20  # bytes of raw space per call; the scanner touches no page but the headers'
_WITHIN = 1800.0  # seconds; an image of 8 000 000 files, the most that are merged, takes minutes
_DIFFERS = 3  # exit status
_NICENESS = "10"
"""A tenth of a core that a container wants, too. With 19 it is a seventieth: beside four busy
processes on two cores it took up to 20 s to begin, with 10 up to 5 s, and whoever waits for an
image to be local waits for it."""


async def prove_tree(index_path: Path, raw_paths: Sequence[Path], name: str) -> None:
    """Compare the tree of an expanded index with what the layers' raw files give.

    `name` is the image's, for errors. Raises IntegrityError if they differ, FirstByteError if the
    comparison could not be made.
    """
    import trio  # not for the process that is started: it would be two thirds of its imports

    # Nice from its start, because its imports take time of a core that containers want.
    command = ["nice", "-n", _NICENESS, sys.executable, "-m", __name__, str(index_path)]
    command += map(str, raw_paths)
    readable, ours = os.pipe()
    with trio.move_on_after(_WITHIN):
        try:
            done = await trio.run_process(command, stdin=readable, capture_stderr=True, check=False)
        finally:
            os.close(readable)
            os.close(ours)
        if done.returncode == _DIFFERS:
            raise IntegrityError(
                f"the tree of {name} is not what its file index says",
                hint="the index is wrong: remove it and build another",
            )
        if done.returncode:
            reason = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
            raise FirstByteError(f"the file index of {name} could not be proven ({reason})")
        return
    raise FirstByteError(f"the file index of {name} could not be proven in {_WITHIN:.0f} s")


def tree_of(raw_paths: Sequence[Path], sizes: Sequence[int]) -> bytes:
    """The tree that local layers give, lowest first. Raises TarError or UnsupportedError.

    `sizes` are those of raw space, in bytes; what a file has beyond is padding.
    """
    merger = Merger()
    for layer, (path, size) in enumerate(zip(raw_paths, sizes, strict=True)):
        merger.apply(layer, _entries(path, size))
    return writer.write(merger.finish(), sizes)


def _entries(path: Path, size: int) -> Iterator[Entry]:
    scanner = TarScanner()
    if size:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as raw:
            for start in range(0, size, _PIECE):
                end = min(start + _PIECE, size)
                with memoryview(raw) as view, view[start:end] as piece:
                    entries = scanner.feed(piece)
                yield from entries
    scanner.finish()


def main(arguments: Sequence[str]) -> int:
    """`INDEX RAW…`: exit status 0 if the index's tree is the layers', 3 if not, 1 on errors."""
    index_path, *raw_paths = map(Path, arguments)
    try:
        index = FileIndex.open(index_path)
        sizes = [table.raw_size for table in index.layers]
        same = tree_of(raw_paths, sizes) == bytes(index.tree.buffer)
    except (FirstByteError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0 if same else _DIFFERS


def _end_with_parent() -> None:
    """Standard input is a pipe that the daemon holds: when it is killed, nobody wants the proof."""

    def wait() -> None:
        os.read(0, 1)
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


if __name__ == "__main__":
    _end_with_parent()
    sys.exit(main(sys.argv[1:]))
