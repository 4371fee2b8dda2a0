"""A startup profile: which chunks starts of an image touch, in what order. docs/profiles.md.

JSON, so that it can be read, kept with the image's source, and compared:

    {"format": "firstbyte startup profile", "version": 1, "name": "registry/app:1",
     "runs": 3, "layers": ["sha256:…"], "touches": [[layer, chunk, milliseconds, seen], …]}

`layers` are diffIDs, the lowest first, so that a profile is good for an image however its layers
are compressed. `touches` are in order, each chunk once: the layer's number, the chunk's, when it
was first read after the first read of all, and in how many of `runs` it was. Equal profiles are
equal bytes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import NamedTuple

import msgspec

from index.errors import FormatError, UnsupportedError
from index.tables import CHUNK_SIZE, MAX_RAW_SIZE

FORMAT = "firstbyte startup profile"
VERSION = 1  # a reader refuses any other

MAX_TOUCHES = 16384
"""Chunks (4 GiB) after which nothing more is recorded: that is no start any more."""

MAX_LAYERS = 4096
MAX_SIZE = 2 << 20
"""Bytes of the largest profile that is read: a touch takes 30 at most."""

MAX_RUNS = 16
"""Runs after which all counts are halved, so that what starts have ceased to touch is forgotten."""

LIKELY = 4
"""A chunk is worth bringing if one start in so many touches it. A guess: a chunk that is not needed
costs 256 KiB of the link, one that is missing a round trip and a stall."""

SMALL_RUN = 4
"""A run that touches less than one in so many of the likely chunks is no start like the others (a
file was looked at, or the kernel had nearly all in its cache): it is not counted as one."""

_DIFF_ID = re.compile(r"sha256:([0-9a-f]{64})")


class Touch(NamedTuple):
    """The first read of a chunk: `after` milliseconds, in `seen` of the profile's runs."""

    layer: int
    chunk: int
    after: int
    seen: int = 1

    @property
    def place(self) -> tuple[int, int]:
        """Layer and chunk."""
        return self.layer, self.chunk


@dataclass(frozen=True, slots=True)
class Profile:
    """`diff_ids` are 32 bytes a layer; `name` is the image's, for people."""

    diff_ids: tuple[bytes, ...]
    touches: tuple[Touch, ...]
    runs: int = 1
    name: str = ""

    @property
    def likely(self) -> tuple[Touch, ...]:
        """The touches that the next start will probably make, in order."""
        return tuple(touch for touch in self.touches if touch.seen * LIKELY >= self.runs)


class _Document(msgspec.Struct, forbid_unknown_fields=True):
    format: str
    version: int
    name: str
    runs: int
    layers: list[str]
    touches: list[tuple[int, int, int, int]]


class _Head(msgspec.Struct):
    format: str
    version: int


def encode(profile: Profile) -> bytes:
    """The profile as it is kept and travels."""
    return msgspec.json.encode(
        _Document(
            format=FORMAT,
            version=VERSION,
            name=profile.name,
            runs=profile.runs,
            layers=[f"sha256:{diff_id.hex()}" for diff_id in profile.diff_ids],
            touches=[(t.layer, t.chunk, t.after, t.seen) for t in profile.touches],
        )
    )


def decode(data: bytes) -> Profile:
    """Read a profile from anywhere. Raises FormatError, or UnsupportedError for another version."""
    if len(data) > MAX_SIZE:
        raise FormatError(f"a startup profile of {len(data)} bytes; {MAX_SIZE} are allowed")
    try:
        head = msgspec.json.decode(data, type=_Head)
        if head.format == FORMAT and head.version != VERSION:
            raise UnsupportedError(
                f"the startup profile has version {head.version}",
                hint=f"this program reads version {VERSION}; update it, or record a new one",
            )
        document = msgspec.json.decode(data, type=_Document)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise FormatError(f"this is not a startup profile ({error})") from error
    if document.format != FORMAT:
        raise FormatError("this is not a startup profile")
    profile = Profile(
        tuple(_diff_id(text) for text in document.layers),
        tuple(Touch(*touch) for touch in document.touches),
        document.runs,
        document.name,
    )
    _check(profile)
    return profile


def merge(old: Profile, run: Profile) -> Profile:
    """What `old` and another run (or several, merged) of the same layers say together.

    The order is the new run's. What it did not touch stays behind what it followed before: it may
    have been in the kernel's cache. Raises FormatError if they are of different layers.
    """
    if old.diff_ids != run.diff_ids:
        raise FormatError("startup profiles of different images cannot be merged")
    touched = {touch.place for touch in run.touches}
    likely = old.likely
    known = sum(touch.place in touched for touch in likely)
    counts = len(likely) <= SMALL_RUN * known
    before = {touch.place: touch.seen for touch in old.touches}
    followers: dict[tuple[int, int] | None, list[Touch]] = {}
    previous: tuple[int, int] | None = None
    for touch in old.touches:
        if touch.place in touched:
            previous = touch.place
        else:
            followers.setdefault(previous, []).append(touch)
    merged = [_at(touch, 0, touch.seen) for touch in followers.pop(None, [])]
    for touch in run.touches:
        seen = before.get(touch.place, 0)
        seen = seen + touch.seen if counts else max(1, seen)  # never more than there are runs
        merged.append(_at(touch, touch.after, seen))
        merged += [_at(left, touch.after, left.seen) for left in followers.get(touch.place, ())]
    runs = old.runs + (run.runs if counts else 0)
    while runs >= MAX_RUNS:
        runs //= 2
        merged = [touch._replace(seen=touch.seen // 2) for touch in merged if touch.seen > 1]
    if len(merged) > MAX_TOUCHES:
        kept = sorted(range(len(merged)), key=lambda at: (-merged[at].seen, at))[:MAX_TOUCHES]
        merged = [merged[at] for at in sorted(kept)]
    return replace(run, touches=tuple(merged), runs=runs)


def _at(touch: Touch, after: int, seen: int) -> Touch:
    return touch._replace(after=after, seen=seen)


def _diff_id(text: str) -> bytes:
    match = _DIFF_ID.fullmatch(text)
    if match is None:
        raise FormatError(f"the startup profile names the layer {text[:80]!r}")
    return bytes.fromhex(match[1])


def _check(profile: Profile) -> None:
    """Raise FormatError unless it makes sense, whatever it is of."""
    layers = len(profile.diff_ids)
    if layers > MAX_LAYERS or len(profile.touches) > MAX_TOUCHES:
        raise FormatError("the startup profile has too many layers or touches")
    if profile.runs < 1:
        raise FormatError(f"the startup profile is of {profile.runs} runs")
    seen: set[tuple[int, int]] = set()
    for touch in profile.touches:
        if (
            not 0 <= touch.layer < layers
            or not 0 <= touch.chunk < MAX_RAW_SIZE // CHUNK_SIZE
            or touch.after < 0
            or not 1 <= touch.seen <= profile.runs
        ):
            raise FormatError(f"the startup profile has the impossible touch {tuple(touch)}")
        seen.add(touch.place)
    if len(seen) < len(profile.touches):
        raise FormatError("the startup profile has a chunk twice")
