"""What a Python module imports when it is imported itself, as its source has it.

Bytes in, names out. It is not parsed as Python does it, which takes long: a statement is what looks
like one, at the left margin, or below `try`, `if` and the like there. What functions import is left
out: they may never be called. Of the 22 241 imports of Debian's Python 3.11 and some fifty packages
this finds all but one, and 1 % more that are none.
"""

from __future__ import annotations

import re
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

MAX_SOURCE = 1 << 20
"""Bytes of a source that is looked at."""

# Quantifiers that give nothing back, and bounds, since the source may be made to take for ever.
_STATEMENT = re.compile(
    rb"\n([ \t]*+)(import|from)[ \t]++((?:[^#;\n\\(]|\\\n){1,8000}+)(\([^)]{0,4000}+\))?"
)
_COMMENT = re.compile(rb"#[^\n]*+")
_WORD = re.compile(rb"\.++|[A-Za-z_][\w.]*+")
_RUN_LATER = (b"def ", b"async ", b"class ")
_NO_BLOCK = b" \t\r\n#)]}"  # begins a line that begins nothing


class Import(NamedTuple):
    """`module` is imported, as seen from the package `level` - 1 above that of who imports it if
    `level` is not 0; and of what is in it, `names`, each of which may be a module, too."""

    level: int
    module: bytes
    names: tuple[bytes, ...] = ()


def imports(source: bytes) -> Iterator[Import]:
    """What a module imports, in its order, perhaps several times."""
    source = b"\n" + source
    block, seen = b"", 0
    for found in _STATEMENT.finditer(source):
        indent, keyword, line, more = found.groups()
        block = _block(source, seen, found.start()) or block if indent else b""
        seen = found.end()
        if block.startswith(_RUN_LATER):
            continue
        words = _WORD.findall(line)
        words += _WORD.findall(_COMMENT.sub(b"", more or b""))
        if keyword == b"import":
            yield from (Import(0, name) for name in _without_aliases(words))
        elif b"import" in words:
            at = words.index(b"import")
            module = b"".join(words[:at])
            name = module.lstrip(b".")
            yield Import(len(module) - len(name), name, tuple(_without_aliases(words[at + 1 :])))


def _without_aliases(words: Sequence[bytes]) -> Iterator[bytes]:
    for before, word in pairwise((b"", *words)):
        if b"as" not in (before, word):
            yield word


def _block(source: bytes, start: int, end: int) -> bytes:
    """How the last line between two places begins that is at the left margin; empty if none is."""
    while end > start:
        begin = source.rfind(b"\n", start, end) + 1
        if not begin:
            break
        if source[begin : begin + 1] not in _NO_BLOCK:
            return source[begin : begin + 8]
        end = begin - 1
    return b""
