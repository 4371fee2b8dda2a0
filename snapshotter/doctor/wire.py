"""Reads protobuf messages field by field, for the few answers of containerd that are looked at.

Source: protobuf.dev/programming-guides/encoding. Only what those answers use is read: varints,
and lengths with bytes; fixed-width numbers are passed over.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from index.errors import FirstByteError

if TYPE_CHECKING:
    from collections.abc import Iterator

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_FIXED_WIDTH = {_FIXED64: 8, _FIXED32: 4}
_MAX_VARINT = 10  # bytes that 64 bits take


class WireError(FirstByteError):
    """Bytes that are no protobuf message."""


def fields(message: bytes) -> Iterator[tuple[int, bytes]]:
    """Number and content of each field that has bytes (strings, messages). Raises WireError."""
    position = 0
    while position < len(message):
        key, position = _varint(message, position)
        number, kind = key >> 3, key & 7
        if kind == _VARINT:
            _, position = _varint(message, position)
        elif kind == _BYTES:
            length, start = _varint(message, position)
            position = start + length
            if position > len(message):
                raise WireError("a protobuf message is cut short")
            yield number, message[start:position]
        elif kind in _FIXED_WIDTH:
            position += _FIXED_WIDTH[kind]
        else:
            raise WireError(f"a protobuf message has a field of unknown kind {kind}")


def _varint(message: bytes, position: int) -> tuple[int, int]:
    """The number at a position, and where it ends."""
    value = 0
    for place, byte in enumerate(message[position : position + _MAX_VARINT]):
        value |= (byte & 0x7F) << (7 * place)
        if byte < 0x80:
            return value, position + place + 1
    raise WireError("a protobuf message is cut short")
