"""How much of the disk the store may take, and how much it takes.

    0                                     fill          trigger    most
    |---- unused layers, fill -------------|--- reads ----|-----------|
                                                  ^ target

Background fill, and layers that nobody uses, end at `fill`. What is read may go on to `most`, where
it is served but not kept. From `trigger` on the coldest chunks go, until `target` is reached; that
is above `fill`, so that what is thrown out is not downloaded again.
"""

from __future__ import annotations

import os
import re
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

from snapshotter.store.errors import StoreFullError, store_error

if TYPE_CHECKING:
    from collections.abc import Iterator

_UNITS = {"B": 1} | {
    f"{prefix}{suffix}": base**power
    for power, prefix in enumerate("kMGT", 1)
    for base, suffix in ((1000, "B"), (1024, "iB"))
}
_UNITS |= {"KB": 1000, "KiB": 1024}
_AMOUNT = re.compile(r"(\d{1,15}(?:\.\d{1,6})?)\s*(%|[A-Za-z]+)", re.ASCII)

_PARTS = ("layers", "indexes", "images")

_HEADROOM = 1 << 30
"""Bytes below the limit that fill leaves to reads; an eighth of the limit if that is less."""

_STEP = 256 << 20
"""Bytes that are evicted together, so that it is done seldom; a quarter of what is between fill
and most if that is less. At 1 Gbit/s reads bring that in two seconds and more."""

REFUSED_SECONDS = 10.0
"""How long status says that chunks are not kept, after the last one that was not: a guess."""


@dataclass(frozen=True, slots=True)
class Amount:
    """Bytes, or a share of a disk: 0 ... 1."""

    size: int = 0
    share: float = 0.0

    @classmethod
    def parse(cls, text: str) -> Self:
        """An amount as people write it: "50 GiB", "1.5 TB", "10%". Raises ValueError."""
        match = _AMOUNT.fullmatch(text.strip())
        if match is None:
            raise ValueError("neither bytes nor a share")
        number, unit = match.groups()
        if unit == "%":
            if float(number) > 100:
                raise ValueError("more than the whole disk")
            return cls(share=float(number) / 100)
        if unit not in _UNITS:
            raise ValueError(f"there is no unit {unit}")
        return cls(size=int(float(number) * _UNITS[unit]))

    def of(self, disk: int) -> int:
        """Bytes, on a disk of so many."""
        return self.size + int(self.share * disk)


@dataclass(frozen=True, slots=True)
class Bounds:
    """What an administrator wants: the most that the store may take, and what is to stay free on
    its disk whoever takes the rest."""

    limit: Amount = Amount(share=1.0)
    keep_free: Amount = Amount(share=0.1)


UNBOUNDED = Bounds(keep_free=Amount())
"""Whatever the disk has."""


@dataclass(frozen=True, slots=True)
class Marks:
    """Bytes of the store at which something happens, see above: fill <= target <= trigger <=
    most."""

    fill: int
    target: int
    trigger: int
    most: int


def marks(bounds: Bounds, *, used: int, free: int, disk: int) -> Marks:
    """The marks of a store of `used` bytes on a disk that has `free` of `disk` bytes left.

    Reads may take half of what is to stay free: when others fill the disk, fill stops first, and
    what running containers read goes last.
    """
    limit = bounds.limit.of(disk)
    keep_free = bounds.keep_free.of(disk)
    available = used + free
    most = max(0, min(limit, available - keep_free // 2))
    fill = max(0, min(limit - min(_HEADROOM, limit // 8), available - keep_free))
    step = min(_STEP, (most - fill) // 4)
    return Marks(fill=fill, target=most - 2 * step, trigger=most - step, most=most)


class Space:
    """What the store takes and may take. Thread-safe; all but `measure` takes no time.

    Between two measurements it counts what is written and removed. `now` is a coarse clock for
    whoever notes when something was used: seconds since the start, advanced from time to time.
    """

    def __init__(self, root: Path, bounds: Bounds) -> None:
        """Raises StoreError."""
        self._root = root
        self._bounds = bounds
        self._lock = threading.Lock()
        self._began = time.monotonic()
        self._reserved = 0
        self._in_flight = 0  # bytes that were admitted, and may not be on the disk yet
        # Bytes that a measurement may not see, while there is one.
        self._uncounted: int | None = None
        self._refused_at = -REFUSED_SECONDS
        self.now = 0
        self.used = self.free = self.disk = 0
        self.wanted = 0
        """Bytes that fill waits for."""
        self.starving = False
        """Whether the disk has refused something since the last measurement."""
        self.evicted_bytes = 0
        """Bytes of disk that were taken from chunks and layers since the start."""
        self.measure()

    def measure(self) -> None:
        """Look at what is on the disk. Blocks: 3 ms for 500 layers. Raises StoreError.

        What is written meanwhile counts in full, seen or not: rather too much than too little.
        """
        with self._lock:
            self._uncounted = self._in_flight
        try:
            used = sum(size for name in _PARTS for size in tree_sizes(self._root / name))
            disk = os.statvfs(self._root)
        except OSError as error:
            raise store_error(error, self._root, "cannot measure") from error
        with self._lock:
            uncounted, self._uncounted = self._uncounted or 0, None
            used += uncounted
            self.used = used
            self.free = disk.f_bavail * disk.f_frsize - uncounted
            self.disk = disk.f_blocks * disk.f_frsize
            self.marks = marks(self._bounds, used=used, free=self.free, disk=self.disk)
            self.starving = False

    def tick(self) -> None:
        """Let `now` advance."""
        self.now = int(time.monotonic() - self._began)

    # --- what is written and removed ---

    @contextmanager
    def admitted(self, size: int, path: Path) -> Iterator[None]:
        """So many bytes are written to `path` in the block, unless it raises. Raises StoreFullError
        if that is too much."""
        with self._lock:
            fits = self.used + size <= self.marks.most
            if fits:
                self.used += size
                self.free -= size
                self._in_flight += size
                if self._uncounted is not None:
                    self._uncounted += size
            else:
                self._refused_at = time.monotonic()
        if not fits:
            raise StoreFullError(
                f"cannot write {path}: the store has reached its limit",
                hint="store.limit and store.keep_free in the configuration say what it may take",
            )
        try:
            yield
        except BaseException:
            self.gave_back(size)
            raise
        finally:
            with self._lock:
                self._in_flight -= size

    def gave_back(self, size: int) -> None:
        """So many bytes were removed."""
        with self._lock:
            self.used -= size
            self.free += size

    def evicted(self, size: int) -> None:
        """So many bytes were removed to make room."""
        self.gave_back(size)
        self.evicted_bytes += size

    def note_full(self) -> None:
        """The disk itself has refused."""
        self._refused_at = time.monotonic()
        self.starving = True

    @property
    def over_trigger(self) -> bool:
        """Whether chunks should go."""
        return self.used > self.marks.trigger or self.starving

    @property
    def problem(self) -> str:
        """What is wrong, in one line, or nothing."""
        if time.monotonic() - self._refused_at < REFUSED_SECONDS:
            return "the disk, or the store's share of it, is full: what is read now is not kept"
        return ""

    # --- background fill ---

    def reserve(self, wanted: int, least: int) -> int:
        """Room for fill to write in: as much of `wanted` bytes as there is, or nothing if that is
        less than `least`. What was reserved is released with `release`."""
        with self._lock:
            room = max(0, self.marks.fill - self.used - self._reserved)
            granted = 0 if room < least or self.starving else min(wanted, room)
            if not granted:
                self.wanted = max(self.wanted, wanted)
            self._reserved += granted
            return granted

    def release(self, size: int) -> None:
        """What was reserved has been written, or will not be."""
        with self._lock:
            self._reserved -= size


def tree_sizes(directory: Path) -> Iterator[int]:
    """Bytes of disk that each file below a directory takes, which may not be there."""
    pending = [directory]
    while pending:
        try:
            with os.scandir(pending.pop()) as found:
                entries = list(found)
        except FileNotFoundError:  # it is going just now
            continue
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                pending.append(Path(entry.path))
                continue
            with suppress(FileNotFoundError):
                yield 512 * entry.stat(follow_symlinks=False).st_blocks
