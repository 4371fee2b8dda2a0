"""ELF files with nothing in them but what the dynamic loader looks for."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

BASE = 0x400000
"""Where the whole file is loaded."""

_LOAD, _DYNAMIC, _INTERP = 1, 2, 3
_WRITABLE = -1  # a second _LOAD


def make_elf(
    *,
    interpreter: bytes = b"",
    needed: Sequence[bytes] = (),
    runpath: bytes = b"",
    wide: bool = True,
    order: str = "<",
    writable: tuple[int, int] | None = None,
    exported: bytes = b"",
) -> bytes:
    """A program or library; static if it has no interpreter and needs nothing. `writable` is where
    in the file a segment is said to be that the loader changes, and its size. The names of what is
    `exported` come before the others."""
    header, row = (64, 56) if wide else (52, 32)
    form = order + ("qQ" if wide else "iI")
    kinds = [
        _LOAD,
        *([_WRITABLE] if writable else []),
        *([_INTERP] if interpreter else []),
        *([_DYNAMIC] if needed or runpath else []),
    ]
    strings, places = bytearray(b"\0" + exported + b"\0"), []
    for name in (*needed, *([runpath] if runpath else [])):
        places.append(len(strings))
        strings += name + b"\0"
    interpreter_at = header + row * len(kinds)
    strings_at = interpreter_at + len(interpreter) + 1
    dynamic_at = strings_at + len(strings)
    tags = [(1, place) for place in places[: len(needed)]]
    tags += [(29, places[-1])] if runpath else []
    tags += [(5, BASE + strings_at), (10, len(strings)), (0, 0), (1, 1 << 20)]
    section = b"".join(struct.pack(form, *tag) for tag in tags)
    end = dynamic_at + len(section)
    parts = {
        _LOAD: (0, end),
        _WRITABLE: writable or (0, 0),
        _INTERP: (interpreter_at, len(interpreter) + 1),
        _DYNAMIC: (dynamic_at, len(section)),
    }
    rows = b""
    for kind in kinds:
        offset, size = parts[kind]
        kind, flags = (_LOAD, 6) if kind == _WRITABLE else (kind, 4)
        if wide:
            rows += struct.pack(
                order + "IIQQQQQQ", kind, flags, offset, BASE + offset, 0, size, size, 1
            )
        else:
            rows += struct.pack(
                order + "IIIIIIII", kind, offset, BASE + offset, 0, size, size, flags, 1
            )
    identity = b"\x7fELF" + bytes((1 + wide, 1 + (order == ">"), 1)) + bytes(9)
    word = "Q" if wide else "I"
    rest = struct.pack(
        f"{order}HHI{word}{word}{word}IHHHHHH",
        *(3, 62, 1, 0, header, 0, 0, header, row, len(kinds), 0, 0, 0),
    )
    return identity + rest + rows + interpreter + b"\0" + bytes(strings) + section
