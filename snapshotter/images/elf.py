"""What the dynamic loader will look for, from the bytes of an ELF file.

Of either class and byte order; nothing but what `foresight` asks for. Sources: System V ABI,
chapters 4 (object files) and 5 (program loading and dynamic linking).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import NamedTuple

from index.errors import FormatError

MAGIC = b"\x7fELF"

HEAD = 4096
"""Bytes from a file's start that have the program headers of all but strange files."""

MAX_DYNAMIC = 64 << 10
"""Bytes of a dynamic section; 30 entries of 16 bytes are usual."""

MAX_NAME = 4096
"""Bytes of a name that is looked for, and the end after it. It is read by itself: the table that it
is in has 5 MB in libnode."""

MAX_NEEDED = 256

_WIDE = 2  # e_ident[EI_CLASS]
_ORDERS = {1: "<", 2: ">"}  # e_ident[EI_DATA]
_PT_LOAD, _PT_DYNAMIC, _PT_INTERP = 1, 2, 3
_PF_X, _PF_W = 1, 2
_DT_NULL, _DT_NEEDED, _DT_STRTAB, _DT_STRSZ, _DT_RPATH, _DT_RUNPATH = 0, 1, 5, 10, 15, 29


class Part(NamedTuple):
    """Bytes of the file."""

    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class Program:
    """`interpreter` is where the path of the loader is, None in libraries and in static programs;
    `dynamic` where the dynamic section is, None in static ones. `linked` is what the loader reads
    all of: the tables at the start, if they are apart from code, and what it changes."""

    interpreter: Part | None
    dynamic: Part | None
    linked: tuple[Part, ...]
    _wide: bool
    _order: str
    _loads: tuple[tuple[int, int, int], ...]  # address, offset in the file, size in it

    def offset_of(self, address: int) -> int:
        """Where in the file an address of the loaded program is. Raises FormatError."""
        for start, offset, size in self._loads:
            if start <= address < start + size:
                return offset + address - start
        raise FormatError(f"no part of the program is loaded at {address:#x}")


@dataclass(frozen=True, slots=True)
class Dynamic:
    """`strings` is where the names are, `needed` and `paths` are places in that."""

    strings: Part
    needed: tuple[int, ...]
    paths: tuple[int, ...]


def program(head: bytes) -> Program:
    """Read a file's HEAD. Raises FormatError if it is no ELF file, or a damaged one."""
    if len(head) < 20 or not head.startswith(MAGIC) or head[5] not in _ORDERS:
        raise FormatError("this is no ELF file")
    wide, order = head[4] == _WIDE, _ORDERS[head[5]]
    try:
        if wide:
            (table,) = struct.unpack_from(order + "Q", head, 32)
            size, count = struct.unpack_from(order + "HH", head, 54)
            form, pick = order + "IIQQQQQQ", (0, 2, 3, 5, 1)
        else:
            (table,) = struct.unpack_from(order + "I", head, 28)
            size, count = struct.unpack_from(order + "HH", head, 42)
            form, pick = order + "IIIIIIII", (0, 1, 2, 4, 6)
        rows = [struct.unpack_from(form, head, table + number * size) for number in range(count)]
    except struct.error as error:
        raise FormatError("an ELF file's program headers are not where its start is") from error
    interpreter = dynamic = None
    loads: list[tuple[int, int, int]] = []
    linked: list[Part] = []
    for row in rows:
        kind, offset, address, in_file, flags = (row[column] for column in pick)
        if kind == _PT_LOAD:
            if flags & _PF_W or not (loads or flags & _PF_X):
                linked.append(Part(offset, in_file))
            loads.append((address, offset, in_file))
        elif kind == _PT_DYNAMIC:
            dynamic = Part(offset, in_file)
        elif kind == _PT_INTERP:
            interpreter = Part(offset, in_file)
    return Program(interpreter, dynamic, tuple(linked), wide, order, tuple(loads))


def dynamic(of: Program, section: bytes) -> Dynamic:
    """Read the dynamic section of a program. Raises FormatError."""
    form = of._order + ("qQ" if of._wide else "iI")
    whole = len(section) - len(section) % struct.calcsize(form)
    address = size = 0
    needed: list[int] = []
    paths: list[int] = []
    for tag, value in struct.iter_unpack(form, section[:whole]):
        if tag == _DT_NULL:
            break
        if tag == _DT_NEEDED:
            needed.append(value)
        elif tag in (_DT_RPATH, _DT_RUNPATH):
            paths.append(value)
        elif tag == _DT_STRTAB:
            address = value
        elif tag == _DT_STRSZ:
            size = value
    if len(needed) > MAX_NEEDED:
        raise FormatError(f"an ELF file needs {len(needed)} libraries")
    strings = Part(of.offset_of(address), size) if needed or paths else Part(0, 0)
    return Dynamic(strings, tuple(needed), tuple(paths))


def name_at(strings: Part, place: int) -> Part:
    """Where a name is that begins at a place of a string table. Raises FormatError."""
    if not 0 <= place < strings.size:
        raise FormatError("an ELF file has a name outside of its names")
    return Part(strings.offset + place, min(MAX_NAME, strings.size - place))


def string(found: bytes) -> bytes:
    """A name, and what follows it. Raises FormatError if it has no end."""
    name, end, _ = found.partition(b"\0")
    if not end:
        raise FormatError("an ELF file has a name that does not end")
    return name
