"""Makes the database of the sample application: the same bytes on every run of one machine."""

from __future__ import annotations

import random
import sqlite3
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

BOOKS = 40_000  # about 10 MB, of which a start reads a few pages

_SCHEMA = """
CREATE TABLE book (title TEXT, author TEXT, year INTEGER, price TEXT, summary TEXT);
CREATE TABLE fact (name TEXT PRIMARY KEY, value INTEGER);
"""
_SYLLABLES = ("an", "ber", "cor", "dil", "en", "fal", "gor", "hin", "is", "mar", "or", "tun")


def write(path: Path) -> None:
    """Make the database at `path`, which must not exist."""
    connection = sqlite3.connect(path)
    try:
        connection.executescript(_SCHEMA)
        connection.executemany("INSERT INTO book VALUES (?, ?, ?, ?, ?)", _books())
        connection.execute("INSERT INTO fact VALUES ('books', ?)", (BOOKS,))
        connection.execute("CREATE INDEX by_title ON book (title)")
        connection.commit()
    finally:
        connection.close()


def _books() -> Iterator[tuple[str, str, int, str, str]]:
    dice = random.Random(1)  # noqa: S311
    for _ in range(BOOKS):
        title, author, summary = (_words(dice, count) for count in (3, 2, 20))
        price = f"{dice.randint(400, 6000) / 100}"
        yield title.title(), author.title(), dice.randint(1850, 2020), price, summary


def _words(dice: random.Random, count: int) -> str:
    return " ".join("".join(dice.choices(_SYLLABLES, k=2)) for _ in range(count))
