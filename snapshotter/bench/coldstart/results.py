"""What was measured, as it is kept: one JSON file, to which later runs may add."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import msgspec

from snapshotter.bench.coldstart.residency import Touched  # noqa: TC001  (msgspec reads it)
from snapshotter.bench.errors import BenchError
from snapshotter.store.durable import write_file

if TYPE_CHECKING:
    from pathlib import Path

VERSION = 1


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """An image. Bytes of its layers, compressed; what a start from the local disk reads of it, and
    the bytes of its startup pack: the chunks of its startup profile, compressed (None: that was not
    measured yet)."""

    reference: str
    layers: int
    compressed_bytes: int
    group: str = ""
    touched: Touched | None = None
    profile_bytes: int | None = None


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """One start of `image` in `mode` over `link`; `at` is when, in UTC.

    Seconds since the start was asked for: until the image was `pulled`, the container `created`,
    its program `started`, the workload `ready`, and all of the image `local` (None: was not waited
    for). `work` is how long the work took after that.

    Bytes and requests are what the link has carried until ready, and until local. `needed_bytes` is
    what FirstByte fetched by then because somebody waited, or was about to. `pulls` counts how
    often a pull was tried. The daemon's are FirstByte's, or containerd's without it; podman by
    itself has none. `curve` has bytes over time, `stalls` the seconds of single reads, if the
    workload tells them.
    """

    image: str
    mode: str
    link: str
    at: str
    pulled: float
    created: float
    started: float
    ready: float
    ready_bytes: int
    ready_requests: int
    connections: int
    total_bytes: int
    total_requests: int
    failed_requests: int
    pulls: int = 1
    work: float | None = None
    local: float | None = None
    needed_bytes: int | None = None
    fuse_requests: int | None = None
    daemon_cpu_seconds: float | None = None
    daemon_peak_bytes: int | None = None
    disk_bytes: int | None = None
    curve: list[tuple[float, int]] = []
    stalls: list[float] = []


class Results(msgspec.Struct, kw_only=True):
    """`conditions` are those of each run that added samples."""

    version: int = VERSION
    conditions: list[dict[str, str]] = []
    images: dict[str, Facts] = {}
    samples: list[Sample] = []

    def count(self, image: str, mode: str, link: str) -> int:
        """How many samples there are of one kind."""
        return len(self.of(image, mode, link))

    def of(self, image: str, mode: str, link: str) -> list[Sample]:
        """The samples of one kind."""
        return [
            sample
            for sample in self.samples
            if (sample.image, sample.mode, sample.link) == (image, mode, link)
        ]


def read(path: Path) -> Results:
    """Results that were written. Raises BenchError, or OSError."""
    try:
        results = msgspec.json.decode(path.read_bytes(), type=Results)
    except msgspec.DecodeError as error:
        raise BenchError(f"{path} holds no results of cold starts: {error}") from error
    if results.version != VERSION:
        raise BenchError(
            f"{path} was written by another version of FirstByte", hint="start a new file"
        )
    return results


def write(results: Results, path: Path) -> None:
    """Keep results; the file is replaced as a whole."""
    plain = msgspec.to_builtins(results)
    samples = ",\n  ".join(json.dumps(sample) for sample in plain.pop("samples"))
    head = json.dumps(plain, indent=1).removesuffix("\n}")
    write_file(path, [f'{head},\n "samples": [\n  {samples}\n ]\n}}\n'.encode()])
