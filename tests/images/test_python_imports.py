"""What a module imports is read from its source."""

from __future__ import annotations

import ast
import re
import sysconfig
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapshotter.images.python_imports import Import, imports

STANDARD_LIBRARY = Path(sysconfig.get_path("stdlib"))


def _executed(body: list[ast.stmt]) -> set[Import]:
    """The imports that are executed when a module is, as Python's own parser sees them."""
    found = set()
    for node in body:
        if isinstance(node, ast.Import):
            found |= {Import(0, name.name.encode()) for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            names = tuple(name.name.encode() for name in node.names if name.name != "*")
            found.add(Import(node.level, (node.module or "").encode(), names))
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            for part in ("body", "orelse", "finalbody"):
                found |= _executed(getattr(node, part, []))
            for handler in getattr(node, "handlers", []):
                found |= _executed(handler.body)
    return found


@pytest.mark.parametrize(
    "package", ["", "asyncio", "email", "http", "importlib", "json", "xml/sax"]
)
def test_all_that_the_standard_library_imports_is_found(package: str) -> None:
    expected, found = set(), set()
    for path in sorted((STANDARD_LIBRARY / package).glob("*.py")):
        source = path.read_bytes()
        expected |= {(path, one) for one in _executed(ast.parse(source).body)}
        found |= {(path, one) for one in imports(source)}
    assert expected
    assert expected <= found
    assert len(found - expected) <= 1 + len(expected) // 20  # examples in documentation


def test_what_functions_import_is_left_out() -> None:
    source = b"""
import a
try:
    import b
except ImportError:

    from .c import (
        d,  # not e
        f as g,
    )
def later():
    import h

# the end of it
class Later:
  import i
if True:
\timport j, k.l as m; import n
from . import \\
    o, p as q
"""
    assert list(imports(source)) == [
        Import(0, b"a"),
        Import(0, b"b"),
        Import(1, b"c", (b"d", b"f")),
        Import(0, b"j"),
        Import(0, b"k.l"),
        Import(1, b"", (b"o", b"p")),
    ]


@given(
    st.lists(
        st.sampled_from(
            [
                b"import",
                b"from",
                b" ",
                b"\n",
                b"\\\n",
                b"(",
                b")",
                b",",
                b".",
                b"as",
                b"a",
                b"#",
                b"def ",
            ]
        )
    ).map(b"".join)
    | st.binary()
)
def test_any_bytes_may_come(source: bytes) -> None:
    for one in imports(source):
        for name in (one.module, *one.names):
            assert re.fullmatch(rb"[\w.]*", name)


@pytest.mark.parametrize(
    "source",
    [
        b"from x import (\n",
        b"from" + b" " * 500 + b"import",
        b"from ........ ",
        b" import a\n",
        b"import a, \\\n",
        b"\n" + b" " * 500,
    ],
)
def test_what_is_made_to_take_long_comes_to_an_end(source: bytes) -> None:
    for _ in imports(source * ((1 << 18) // len(source))):
        pass
