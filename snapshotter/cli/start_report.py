"""Where the time of a start went: the daemon's record of it, summed up. Nothing here does I/O."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import TYPE_CHECKING

import msgspec

from snapshotter.cli.progress import mb
from snapshotter.fetch.trace import covered

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from snapshotter.daemon.protocol import StartRecord

    Namer = Callable[[int, int, int], bytes | None]
    """The path of the file that has `length` bytes at an offset of a layer's raw space."""

CLASSES = ("blocked", "readahead", "startup", "fill")
NO_FILE = "(no file: headers, padding)"

_FILES = 20  # that are printed; JSON has all


class FileStalls(msgspec.Struct, frozen=True):
    """What readers of one file waited for. `seconds` is the sum over all reads, `bytes` what they
    asked for."""

    path: str
    seconds: float
    reads: int
    bytes: int


class Wire(msgspec.Struct, frozen=True):
    """What one class of fetching took: `bytes` as on the network, `seconds` in which at least one
    of its requests was under way."""

    requests: int
    bytes: int
    seconds: float


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """The start of an image. Times are seconds, `waited` those in which at least one read waited.

    `unread_bytes` are of chunks that were fetched for another reason than background fill, or on
    the way to others, and were not read so far.
    """

    reference: str
    digest: str
    began_ns: int
    recorded: float
    steps: dict[str, float]
    waited: float
    stalls: int
    longest: float
    files: list[FileStalls]
    wire: dict[str, Wire]
    chunks_read: int
    fetched_bytes: int
    unread_bytes: int
    unread_chunks: int


def report(record: StartRecord, name: Namer) -> Report:
    """Sum up a record; `name` tells whose bytes were waited for."""
    seconds: defaultdict[str, float] = defaultdict(float)
    reads: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for stall in record.stalls:
        path = name(stall.layer, stall.offset, stall.length)
        text = NO_FILE if path is None else path.decode(errors="backslashreplace")
        seconds[text] += stall.seconds
        reads[text] += 1
        sizes[text] += stall.length
    wire = {}
    for kind in CLASSES:
        found = [one for one in record.exchanges if one.kind == kind]
        spans = [(one.at, one.ended if one.ended >= 0 else record.seconds) for one in found]
        wire[kind] = Wire(len(found), sum(one.bytes for one in found), covered(spans))
    wanted = [chunk for chunk in record.chunks if chunk.cause != "fill"]
    unread = [chunk for chunk in wanted if not chunk.read]
    return Report(
        reference=record.reference,
        digest=record.digest,
        began_ns=record.began_ns,
        recorded=min(record.seconds, record.window),
        steps={step.name: step.seconds for step in record.steps},
        waited=covered([(one.at, one.at + one.seconds) for one in record.stalls]),
        stalls=len(record.stalls),
        longest=max((one.seconds for one in record.stalls), default=0.0),
        files=[
            FileStalls(path, total, reads[path], sizes[path])
            for path, total in sorted(seconds.items(), key=lambda pair: -pair[1])
        ],
        wire=wire,
        chunks_read=record.first_reads,
        fetched_bytes=sum(chunk.length for chunk in wanted),
        unread_bytes=sum(chunk.length for chunk in unread),
        unread_chunks=len(unread),
    )


def lines(found: Report) -> Iterator[str]:
    """A report for people."""
    yield f"{found.reference} ({found.digest}): {found.recorded:.1f} s since it was opened"
    yield "opening it"
    for step, seconds in found.steps.items():
        yield f"  {step:<12} {seconds:8.3f} s"
    yield (
        f"waiting: {found.stalls} reads, {found.waited:.3f} s in which at least one waited, "
        f"the longest {found.longest:.3f} s"
    )
    for file in found.files[:_FILES]:
        yield f"  {file.seconds:8.3f} s {file.reads:5} reads {mb(file.bytes):>10}  {file.path}"
    if len(found.files) > _FILES:
        rest = found.files[_FILES:]
        yield f"  {sum(file.seconds for file in rest):8.3f} s in {len(rest)} other files"
    yield "on the wire"
    for kind, wire in found.wire.items():
        yield (
            f"  {kind:<10} {wire.requests:5} requests {mb(wire.bytes):>10} in {wire.seconds:.3f} s"
        )
    yield (
        f"fetched and not read: {mb(found.unread_bytes)} in {found.unread_chunks} chunks, of "
        f"{mb(found.fetched_bytes)} that came before fill (unpacked)"
    )
