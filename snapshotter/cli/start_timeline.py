"""A start as a picture: requests on the wire by class, and who waited, over time. SVG 1.1."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from snapshotter.cli.start_report import CLASSES

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from snapshotter.daemon.protocol import StartRecord

_COLOURS = {
    "blocked": "#c0392b",
    "readahead": "#e07b39",
    "startup": "#1b6ca8",
    "fill": "#b5b5b5",
    "stalls": "#8f5aa8",
    "opening": "#3a9a5b",
}
_WIDTH, _LEFT, _RIGHT, _TOP = 1000, 90, 20, 46  # pixels
_LANE, _SPACE = 7, 10  # height of a lane, and between two kinds
_LANES = 24  # of one kind; more are drawn over each other
_TICKS = 10

Span = tuple[float, float, str]
"""Begin and end in seconds, and what it was, for who points at it."""


def draw(record: StartRecord) -> str:
    """The picture, a document by itself."""
    rows = dict(_rows(record))
    end = max((stop for spans in rows.values() for _, stop, _ in spans), default=1.0) or 1.0
    scale = (_WIDTH - _LEFT - _RIGHT) / end
    parts: list[str] = []
    y = float(_TOP)
    for kind, spans in rows.items():
        parts.append(_text(_LEFT - 8, y + _LANE, kind, "end"))
        height = _LANE
        for lane, (start, stop, what) in _packed(spans):
            top = y + lane * _LANE
            height = max(height, (lane + 1) * _LANE)
            parts.append(
                f"<rect x='{_LEFT + start * scale:.2f}' y='{top:.1f}' "
                f"width='{max(0.5, (stop - start) * scale):.2f}' height='{_LANE - 1}' "
                f"fill='{_COLOURS[kind]}'><title>{escape(what)}</title></rect>"
            )
        y += height + _SPACE
    axis = []
    for tick in range(_TICKS + 1):
        x = _LEFT + tick * (_WIDTH - _LEFT - _RIGHT) / _TICKS
        axis.append(f"<path d='M{x:.1f} {_TOP - 6}V{y:.1f}' stroke='#e4e4e4'/>")
        axis.append(_text(x, y + 12, f"{tick * end / _TICKS:.2f}", "middle"))
    title = f"{record.reference}: seconds since it was opened"
    return (
        f"<svg xmlns='http://www.w3.org/2000/svg' width='{_WIDTH}' height='{y + 24:.0f}' "
        "font-family='system-ui, Helvetica, Arial, sans-serif' font-size='11'>"
        "<rect width='100%' height='100%' fill='white'/>"
        f"{_text(8, 18, title, 'start')}{''.join(axis)}{''.join(parts)}</svg>\n"
    )


def _rows(record: StartRecord) -> Iterator[tuple[str, list[Span]]]:
    """What is drawn, from top to bottom."""
    yield (
        "opening",
        [
            (step.at, step.at + step.seconds, f"{step.name}: {step.seconds:.3f} s")
            for step in record.steps
        ],
    )
    yield (
        "stalls",
        [
            (
                stall.at,
                stall.at + stall.seconds,
                f"{stall.seconds:.3f} s for {stall.length} bytes at {stall.offset} of layer "
                f"{stall.layer}",
            )
            for stall in record.stalls
        ],
    )
    for kind in CLASSES:
        yield (
            kind,
            [
                (
                    one.at,
                    one.ended if one.ended >= 0 else record.seconds,
                    f"{one.bytes} bytes of layer {one.layer}, first byte after "
                    f"{one.answered - one.at:.3f} s"
                    if one.answered >= 0
                    else f"no answer from layer {one.layer}",
                )
                for one in record.exchanges
                if one.kind == kind
            ],
        )


def _packed(spans: Iterable[Span]) -> Iterator[tuple[int, Span]]:
    """Spans in as few lanes as it takes for none to cover another."""
    ends: list[float] = []
    for span in sorted(spans):
        lane = next((n for n, end in enumerate(ends) if end <= span[0]), len(ends))
        if lane == len(ends) and lane < _LANES:
            ends.append(span[1])
        else:
            lane = min(lane, _LANES - 1)
            ends[lane] = max(ends[lane], span[1])
        yield lane, span


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f"<text x='{x:.1f}' y='{y:.1f}' text-anchor='{anchor}'>{escape(text)}</text>"
