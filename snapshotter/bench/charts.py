"""Charts as SVG: enough of them for reports of benchmarks, and no library.

Source: SVG 1.1. Text is laid out by an estimate of its width, so that nothing needs to be measured.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

PALETTE = ("#1b6ca8", "#e07b39", "#3a9a5b", "#8f5aa8", "#b8a22b", "#7f7f7f")
"""Colours that can be told apart by nearly everybody, and in print."""

_FONT = "font-family='system-ui, Helvetica, Arial, sans-serif'"
_INK, _FAINT = "#222", "#dcdcdc"
_SIZE, _SMALL = 12, 11  # of text, in pixels
_CHARACTER = 6.6  # pixels, about, of text of that size
_WIDTH = 860
_ROW, _BAR, _GAP = 19, 13, 12
_PLOT_HEIGHT = 260
_TICKS = 6


@dataclass(frozen=True, slots=True)
class Bar:
    """A row: `values` of the series one after the other. `mark` is drawn across it."""

    label: str
    values: tuple[float, ...]
    mark: float | None = None


@dataclass(frozen=True, slots=True)
class Group:
    """Rows that belong together."""

    label: str
    bars: tuple[Bar, ...]


@dataclass(frozen=True, slots=True)
class Line:
    """`points` from left to right; at `mark` (of x) it has a dot."""

    label: str
    points: tuple[tuple[float, float], ...]
    mark: float | None = None


def stacked_bars(
    title: str, groups: Sequence[Group], series: Sequence[str], unit: str, mark: str = ""
) -> str:
    """Horizontal bars. `series` names what they are made of, `mark` what the mark is."""
    longest = max(len(bar.label) for group in groups for bar in group.bars)
    left, right = 24 + longest * _CHARACTER, 70.0
    largest = max(max(sum(bar.values), bar.mark or 0) for group in groups for bar in group.bars)
    ticks = _ticks(largest)
    scale = (_WIDTH - left - right) / max(ticks[-1], largest)
    parts: list[str] = []
    y = 58.0
    for group in groups:
        parts.append(_text(8, y + _SIZE, group.label, weight="600"))
        y += _ROW
        for bar in group.bars:
            parts.append(_text(left - 8, y + _BAR - 2, bar.label, anchor="end"))
            x = left
            for value, colour in zip(bar.values, PALETTE, strict=False):
                width = value * scale
                parts.append(
                    f"<rect x='{x:.1f}' y='{y:.1f}' width='{width:.1f}' height='{_BAR}' "
                    f"fill='{colour}'/>"
                )
                x += width
            label = f"{_number(sum(bar.values))} {unit}"
            if bar.mark is not None:
                place = left + bar.mark * scale
                parts.append(_stroke(place, y - 2, place, y + _BAR + 2, _INK, 2))
                x = max(x, place)
            parts.append(_text(x + 6, y + _BAR - 2, label, size=_SMALL))
            y += _ROW
        y += _GAP
    axis = [_stroke(left + t * scale, 50, left + t * scale, y, _FAINT) for t in ticks]
    axis += [_text(left + t * scale, y + 14, f"{t:g}", anchor="middle", size=_SMALL) for t in ticks]
    axis.append(_text(_WIDTH - 8, y + 14, unit, anchor="end", size=_SMALL))
    legend = _legend([*zip(series, PALETTE, strict=False)], mark)
    return _svg(y + 24, [_text(8, 18, title, weight="600", size=14), legend, *axis, *parts])


def lines(
    title: str,
    drawn: Sequence[Line],
    x_label: str,
    y_label: str,
    *,
    logarithmic: bool = False,
    percent: bool = False,
) -> str:
    """Steps from left to right, as counters grow. `logarithmic` is about x, whose values must then
    be above 0; `percent` makes y go from 0 to 100."""
    left, right, top = 58.0, 24.0, 68.0
    xs = [x for line in drawn for x, _ in line.points]
    highest = 100.0 if percent else max(y for line in drawn for _, y in line.points)
    y_ticks = [0, 25, 50, 75, 100] if percent else _ticks(highest)
    height = _PLOT_HEIGHT / max(highest, y_ticks[-1])
    place, x_ticks = _axis(min(xs), max(xs), left, _WIDTH - right, logarithmic=logarithmic)
    bottom = top + _PLOT_HEIGHT
    parts = [_stroke(place(x), top, place(x), bottom, _FAINT) for x in x_ticks]
    parts += [_text(place(x), bottom + 15, f"{x:g}", anchor="middle", size=_SMALL) for x in x_ticks]
    for tick in y_ticks:
        y = bottom - tick * height
        parts.append(_stroke(left, y, _WIDTH - right, y, _FAINT))
        parts.append(_text(left - 6, y + 4, f"{tick:g}", anchor="end", size=_SMALL))
    for line, colour in zip(drawn, PALETTE * len(drawn), strict=False):
        path, before = "", None
        for x, y in line.points:
            across, up = place(x), bottom - y * height
            path += f"M{across:.1f} {up:.1f}" if before is None else f"H{across:.1f}V{up:.1f}"
            before = up
        parts.append(f"<path d='{path}' fill='none' stroke='{colour}' stroke-width='2'/>")
        if line.mark is not None:
            y = max((y for x, y in line.points if x <= line.mark), default=0.0)
            parts.append(
                f"<circle cx='{place(line.mark):.1f}' cy='{bottom - y * height:.1f}' r='5' "
                f"fill='{colour}' stroke='white' stroke-width='1.5'/>"
            )
    parts.append(_text(_WIDTH - right, bottom + 32, x_label, anchor="end", size=_SMALL))
    parts.append(_text(8, top - 8, y_label, size=_SMALL))
    names = [(line.label, colour) for line, colour in zip(drawn, PALETTE * 9, strict=False)]
    head = [_text(8, 18, title, weight="600", size=14), _legend(names, "")]
    return _svg(bottom + 40, [*head, *parts])


def _axis(
    low: float, high: float, start: float, end: float, *, logarithmic: bool
) -> tuple[Callable[[float], float], list[float]]:
    """Where a value is, and which values have ticks."""
    if not logarithmic:
        ticks = _ticks(high)
        span = max(high, ticks[-1])
        return (lambda value: start + (end - start) * value / span), ticks
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    last = max(last, first + 1)

    def place(value: float) -> float:
        return start + (end - start) * (math.log10(value) - first) / (last - first)

    return place, [10.0**power for power in range(first, last + 1)]


def _ticks(largest: float) -> list[float]:
    """Round numbers from 0 to about the largest value."""
    if largest <= 0:
        return [0.0, 1.0]
    rough = largest / _TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    return [round(number * step, 10) for number in range(math.floor(largest / step) + 1)]


def _number(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}"


def _legend(names: Sequence[tuple[str, str]], mark: str) -> str:
    x, parts = 8.0, []
    for name, colour in names:
        parts.append(f"<rect x='{x:.1f}' y='29' width='11' height='11' rx='2' fill='{colour}'/>")
        parts.append(_text(x + 16, 39, name, size=_SMALL))
        x += 32 + len(name) * _CHARACTER
    if mark:
        parts.append(_stroke(x + 4, 28, x + 4, 42, _INK, 2))
        parts.append(_text(x + 12, 39, mark, size=_SMALL))
    return "".join(parts)


def _text(
    x: float, y: float, text: str, *, anchor: str = "start", weight: str = "400", size: int = _SIZE
) -> str:
    return (
        f"<text x='{x:.1f}' y='{y:.1f}' text-anchor='{anchor}' font-weight='{weight}' "
        f"font-size='{size}' fill='{_INK}'>{escape(text)}</text>"
    )


def _stroke(x1: float, y1: float, x2: float, y2: float, colour: str, width: float = 1) -> str:
    return (
        f"<line x1='{x1:.1f}' y1='{y1:.1f}' x2='{x2:.1f}' y2='{y2:.1f}' stroke='{colour}' "
        f"stroke-width='{width:g}'/>"
    )


def _svg(height: float, parts: Sequence[str]) -> str:
    return (
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {_WIDTH} {height:.0f}' "
        f"width='{_WIDTH}' height='{height:.0f}' {_FONT}>"
        f"<rect width='100%' height='100%' fill='white'/>{''.join(parts)}</svg>"
    )
