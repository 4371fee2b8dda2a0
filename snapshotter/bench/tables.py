"""Results as tables: for people, for a page of documentation, for scripts."""

from __future__ import annotations

import json
import textwrap
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

Cell = str | int | float

_WIDTH = 100  # characters of a line of prose
_DIGITS = 3  # significant ones: no measurement here is good for more


@dataclass(frozen=True, slots=True)
class Table:
    """Columns are named with their units; every row has a cell for each.

    `samples` are the single measurements that rows are made of, for scripts alone.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""
    samples: tuple[Mapping[str, object], ...] = ()


def as_text(tables: Sequence[Table]) -> str:
    """For a terminal: columns aligned, numbers to the right."""
    return "\n\n".join(_text(table) for table in tables)


def as_markdown(tables: Sequence[Table]) -> str:
    """For docs/benchmarks.md."""
    return "\n\n".join(_markdown(table) for table in tables)


def as_json(tables: Sequence[Table]) -> str:
    """One JSON object: a list of rows for each title, numbers as they were measured; and one of the
    single samples, where they are kept."""
    named: dict[str, list[Mapping[str, object]]] = {}
    for table in tables:
        named[table.title] = [dict(zip(table.columns, row, strict=True)) for row in table.rows]
        if table.samples:
            named[f"{table.title}: samples"] = list(table.samples)
    return json.dumps(named, indent=2)


def _text(table: Table) -> str:
    lines = [table.columns, *(tuple(map(show, row)) for row in table.rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    numbers = _number_columns(table)
    shown = [
        "  ".join(
            cell.rjust(width) if is_number else cell.ljust(width)
            for cell, width, is_number in zip(line, widths, numbers, strict=True)
        ).rstrip()
        for line in lines
    ]
    return "\n".join([table.title, *(f"  {line}" for line in shown), *_notes(table)])


def _markdown(table: Table) -> str:
    rule = ["---:" if is_number else "---" for is_number in _number_columns(table)]
    lines = [table.columns, rule, *(map(show, row) for row in table.rows)]
    shown = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([f"### {table.title}", "", *shown, *_notes(table)])


def _notes(table: Table) -> list[str]:
    return ["", textwrap.fill(table.note, _WIDTH)] if table.note else []


def _number_columns(table: Table) -> list[bool]:
    """Those with a number, even if some have none."""
    return [
        any(not isinstance(cell, str) for cell in column)
        for column in zip(*table.rows, strict=True)
    ]


def show(cell: Cell) -> str:
    """Three significant digits, thousands set apart."""
    if isinstance(cell, str):
        return cell
    if isinstance(cell, float) and abs(cell) < 10 ** (_DIGITS - 1):
        return f"{cell:#.{_DIGITS}g}".rstrip(".")
    return f"{cell:,.0f}".replace(",", " ")
