"""What an ELF file tells the dynamic loader, of either class and byte order."""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from index.errors import FormatError
from snapshotter.images import elf
from tests.support.elves import make_elf

NAMES = st.lists(st.binary(min_size=1, max_size=30).filter(lambda name: b"\0" not in name))


def read(data: bytes) -> tuple[bytes | None, list[bytes], list[bytes]]:
    """The interpreter, the needed libraries and the search paths of a file."""
    program = elf.program(data[: elf.HEAD])
    interpreter = None
    if program.interpreter is not None:
        at, size = program.interpreter
        interpreter = elf.string(data[at : at + size])
    if program.dynamic is None:
        return interpreter, [], []
    at, size = program.dynamic
    dynamic = elf.dynamic(program, data[at : at + size])

    def name(place: int) -> bytes:
        at, size = elf.name_at(dynamic.strings, place)
        return elf.string(data[at : at + size])

    return interpreter, [*map(name, dynamic.needed)], [*map(name, dynamic.paths)]


@given(NAMES, st.sampled_from([b"", b"$ORIGIN/../lib:/opt"]), st.booleans(), st.sampled_from("<>"))
def test_the_names_come_back(needed: list[bytes], path: bytes, wide: bool, order: str) -> None:
    made = make_elf(interpreter=b"/lib/ld.so", needed=needed, runpath=path, wide=wide, order=order)
    assert read(made) == (b"/lib/ld.so", needed, [path] if path else [])


def test_a_static_program_names_nothing() -> None:
    assert read(make_elf()) == (None, [], [])


def test_a_real_program_names_its_loader_and_the_c_library() -> None:
    interpreter, needed, _ = read(Path(shutil.which("ls") or "").resolve().read_bytes())
    assert interpreter is not None
    assert Path(interpreter.decode()).exists()
    assert any(name.startswith(b"libc.") for name in needed)


@given(st.data(), st.booleans())
def test_a_damaged_one_raises_nothing_else(data: st.DataObject, wide: bool) -> None:
    made = bytearray(make_elf(interpreter=b"/lib/ld.so", needed=[b"liba", b"libb"], wide=wide))
    for _ in range(data.draw(st.integers(1, 4))):
        made[data.draw(st.integers(0, len(made) - 1))] = data.draw(st.integers(0, 255))
    with suppress(FormatError):
        read(bytes(made[: data.draw(st.integers(0, len(made)))]))


@pytest.mark.parametrize("data", [b"", b"\x7fELF", b"#!/bin/sh\n", bytes(100)])
def test_what_is_none_is_refused(data: bytes) -> None:
    with pytest.raises(FormatError, match="no ELF file"):
        elf.program(data)
