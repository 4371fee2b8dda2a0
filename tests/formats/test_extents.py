"""Which file has which bytes of raw space."""

from __future__ import annotations

from index.builder import build
from index.extents import FileExtents
from tests.support import tars

LOWER = tars.tar(
    tars.directory(b"usr"),
    tars.file(b"usr/tool", b"T" * 3000),
    tars.file(b"hidden", b"H" * 2000),
    tars.file(b"empty", b""),
)
UPPER = tars.tar(tars.file(b"usr/data", b"D" * 100), tars.file(b".wh.hidden", b""))


def test_every_byte_is_of_the_file_that_shows_it() -> None:
    files = FileExtents(build([[LOWER], [UPPER]]).tree)
    tool, data = LOWER.index(b"TTT"), UPPER.index(b"DDD")
    assert files.at(0, tool, 1) == b"/usr/tool"
    assert files.at(0, tool + 2999, 1) == b"/usr/tool"
    assert files.at(1, data + 50, 10) == b"/usr/data"


def test_a_range_is_of_the_first_file_in_it() -> None:
    files = FileExtents(build([[LOWER], [UPPER]]).tree)
    tool, data = LOWER.index(b"TTT"), UPPER.index(b"DDD")
    assert files.at(0, 0, 1 << 20) == b"/usr/tool"
    assert files.at(0, tool + 10, 1 << 20) == b"/usr/tool"
    assert files.at(1, 0, data + 1) == b"/usr/data"


def test_what_nobody_sees_is_of_no_file() -> None:
    files = FileExtents(build([[LOWER], [UPPER]]).tree)
    assert files.at(0, 0, 10) is None
    assert files.at(0, LOWER.index(b"HHH"), 100) is None
    assert files.at(0, LOWER.index(b"TTT") + 3000, 10) is None
    assert files.at(7, 0, 100) is None


def test_a_hard_link_is_one_of_its_names() -> None:
    layer = tars.tar(tars.file(b"a", b"A" * 600), tars.hardlink(b"b", b"a"))
    files = FileExtents(build([[layer]]).tree)
    assert files.at(0, layer.index(b"AAA"), 1) in (b"/a", b"/b")


def test_an_image_without_files_has_no_extents() -> None:
    assert FileExtents(build([[tars.tar(tars.directory(b"d"))]]).tree).at(0, 0, 1000) is None
