"""PAX extended headers: records of text that override the fields of the header that follows.

Source: POSIX.1-2017, pax, "pax Extended Header". One record is `LENGTH KEY=VALUE NEWLINE`, where
LENGTH is decimal and counts the whole record, itself included; so values may hold any byte.
Functions here raise ValueError; the scanner adds which member it was.
"""

from __future__ import annotations

import re

XATTR_PREFIX = b"SCHILY.xattr."
"""Of extended attributes: full names follow it. Invented by star, used by all container tools."""

_TEXT_KEYS = frozenset({b"path", b"linkpath", b"uname", b"gname"})
_LENGTH_DIGITS = 20
_INTEGER = re.compile(rb"[+-]?[0-9]{1,19}")
_TIME = re.compile(rb"([+-]?[0-9]{1,19})(?:\.([0-9]*))?")
_INT64 = 1 << 63
SECOND = 1_000_000_000
"""Nanoseconds."""


def parse_records(data: bytes) -> list[tuple[bytes, bytes]]:
    """Split the data of an extended header into (key, value) pairs, in order.

    The rules on NUL bytes are those of Go's archive/tar: none in a key, nor in the values of
    names; anywhere in other values.
    """
    records = []
    position = 0
    while position < len(data):
        space = data.find(b" ", position, position + _LENGTH_DIGITS)
        digits = data[position:space]
        if space < 0 or not digits.isdigit():
            raise ValueError("a PAX record does not start with its length")
        end = position + int(digits)
        if end > len(data) or end <= space + 1 or data[end - 1] != 0x0A:
            raise ValueError("a PAX record's length does not lead to its end")
        key, equals, value = data[space + 1 : end - 1].partition(b"=")
        if not key or not equals:
            raise ValueError("a PAX record is not of the form key=value")
        if b"\0" in (value if key in _TEXT_KEYS else key):
            raise ValueError("a PAX record's name holds a NUL byte")
        records.append((key, value))
        position = end
    return records


def parse_integer(value: bytes) -> int:
    """A decimal number of at most 64 bits."""
    if not _INTEGER.fullmatch(value):
        raise ValueError(f"a PAX record holds {value[:40]!r} where a number belongs")
    number = int(value)
    if not -_INT64 <= number < _INT64:
        raise ValueError("a PAX record's number has more than 64 bits")
    return number


def parse_time(value: bytes) -> int:
    """Nanoseconds since the epoch from decimal seconds; further digits are cut off."""
    match = _TIME.fullmatch(value)
    if not match:
        raise ValueError(f"a PAX record holds {value[:40]!r} where a time belongs")
    seconds = parse_integer(match[1])
    fraction = int((match[2] or b"")[:9].ljust(9, b"0"))
    return seconds * SECOND + (-fraction if match[1].startswith(b"-") else fraction)
