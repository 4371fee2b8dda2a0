"""Files that a start will read are known before it begins: program, loader, libraries."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from index.builder import build
from index.extents import FileExtents
from index.tables import CHUNK_SIZE, Codec
from snapshotter.images import foresight, startup_files
from snapshotter.images.foresight import Foresight
from snapshotter.registry.manifest import RunConfig
from tests.support.blobs import make_layer
from tests.support.elves import make_elf
from tests.support.foreseeing import entries, foreseen
from tests.support.tars import file, symlink, tar

if TYPE_CHECKING:
    from tests.support.fetching import Node

LOADER = b"/lib64/ld.so"


def _linked(program: Path) -> dict[Path, Path]:
    """What the loader of this machine says it will map, by the paths at which it finds that."""
    listed = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
    words = [Path(word) for word in listed.split() if word.startswith("/")]
    return {word: word.resolve() for word in words}


@pytest.fixture
def program() -> Path:
    return Path(shutil.which("ls") or "").resolve()


@pytest.fixture
def libraries(program: Path) -> dict[Path, Path]:
    return _linked(program)


async def test_a_real_program_brings_all_that_its_loader_will_map(
    node: Node, program: Path, libraries: dict[Path, Path]
) -> None:
    real = {program, *libraries.values()}
    files = {str(path)[1:]: path.read_bytes() for path in real}
    files["usr/lib/libnobody.so.1"] = make_elf()
    links = [
        symlink(b"lib/" + bytes(path.name, "ascii"), bytes(to)) for path, to in libraries.items()
    ]
    links += [
        symlink(bytes(path)[1:], bytes(to))
        for path, to in libraries.items()
        if path.name.startswith("ld-")
    ]
    found = await foreseen(node, files, *links, cmd=[str(program)])
    assert found == sorted(map(str, real))


FILES = {
    "lib64/ld.so": make_elf(),
    "usr/bin/tool": make_elf(interpreter=LOADER, needed=[b"liba.so"]),
    "usr/bin/env": make_elf(interpreter=LOADER),
    "usr/bin/sh": make_elf(interpreter=LOADER),
    "usr/bin/other": make_elf(),
    "usr/lib/liba.so": make_elf(needed=[b"libb.so", b"liba.so"]),
    "usr/lib/libb.so": make_elf(needed=[b"liba.so", b"libmissing.so"]),
    "opt/app/bin/app": make_elf(
        interpreter=LOADER, needed=[b"libapp.so"], runpath=b"/nowhere:$ORIGIN/../lib"
    ),
    "opt/app/lib/libapp.so": make_elf(),
    "usr/lib/libapp.so": make_elf(),
    "srv/script": b"#!/usr/bin/env tool\nand more\n",
    "srv/data": b"nothing that runs",
    "etc/passwd": b"root:x:0:0::/:/usr/bin/other\n",
}
TOOL = ["/lib64/ld.so", "/usr/bin/tool", "/usr/lib/liba.so", "/usr/lib/libb.so"]
ALWAYS = ["/etc/passwd"]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"cmd": ["tool"]}, TOOL),
        ({"cmd": ["bin/tool"], "working_dir": "/usr"}, TOOL),
        ({"cmd": ["tool"], "env": ["PATH=/opt/app/bin"]}, []),
        (
            {"entrypoint": ["app"], "env": ["PATH=/opt/app/bin"]},
            ["/lib64/ld.so", "/opt/app/bin/app", "/opt/app/lib/libapp.so"],
        ),
        ({"entrypoint": ["/srv/script"], "cmd": ["x"]}, ["/srv/script", "/usr/bin/env", *TOOL]),
        ({"entrypoint": ["other"], "cmd": ["tool"]}, ["/usr/bin/other", *TOOL]),
        (
            {"entrypoint": ["other"], "cmd": ["script"], "working_dir": "/srv"},
            ["/srv/script", "/usr/bin/env", "/usr/bin/other", *TOOL],
        ),
        ({"cmd": ["sh", "-c", "exec tool --fast"]}, ["/usr/bin/sh", *TOOL]),
        (
            {"cmd": ["other", "data", "tool"], "working_dir": "/srv"},
            ["/srv/data", "/usr/bin/other"],
        ),
        ({}, []),
        ({"cmd": ["missing", ""]}, []),
    ],
    ids=lambda value: str(value)[:40],
)
async def test_what_the_command_line_leads_to(
    node: Node, config: dict[str, list[str] | str], expected: list[str]
) -> None:
    assert await foreseen(node, FILES, **config) == sorted({*expected, *ALWAYS})


async def test_libraries_are_found_where_the_image_says(node: Node) -> None:
    files = {name: FILES[name] for name in ("lib64/ld.so", "usr/bin/tool", "usr/lib/libb.so")}
    files["opt/liba.so"] = make_elf()
    found = await foreseen(node, files, cmd=["tool"], env=["LD_LIBRARY_PATH=/nowhere:/opt"])
    assert "/opt/liba.so" in found


async def test_what_a_library_opens_by_itself_comes_with_it(node: Node) -> None:
    files = {
        "usr/bin/tool": make_elf(needed=[b"libcrypto.so.3"]),
        "usr/lib/libcrypto.so.3": make_elf(),
        "etc/ssl/openssl.cnf": b"[default]",
    }
    found = await foreseen(node, files, cmd=["tool"])
    assert found == ["/etc/ssl/openssl.cnf", "/usr/bin/tool", "/usr/lib/libcrypto.so.3"]


async def test_what_configures_a_program_comes_with_it(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its name, or what is before a hyphen in it; small files alone, through symlinks, too."""
    monkeypatch.setattr(foresight, "LARGEST_CONFIGURATION", CHUNK_SIZE)
    files = {
        "usr/bin/tool-server": make_elf(),
        "usr/bin/other": make_elf(),
        "etc/tool/main": b"included = parts",
        "etc/tool/parts.d/one": b"on",
        "etc/tool/parts.d/far/away": b"",
        "etc/tool/certificates": bytes(2 * CHUNK_SIZE),
        "etc/tool-server/flag": b"yes",
        "etc/other/main": b"",
        "usr/share/tool/available": b"more",
    }
    link = symlink(b"etc/tool/enabled", b"../../usr/share/tool/available")
    round_ = symlink(b"etc/tool/round", b"../tool")
    found = await foreseen(node, files, link, round_, cmd=["tool-server", "x"])
    assert found == [
        "/etc/tool-server/flag",
        "/etc/tool/main",
        "/etc/tool/parts.d/one",
        "/usr/bin/tool-server",
        "/usr/share/tool/available",
    ]


async def test_there_is_an_end_to_what_configures_a_program(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(foresight, "LARGEST_CONFIGURATION", CHUNK_SIZE)
    files = {f"etc/tool/{number:03}": b"x" for number in range(100)}
    found = await foreseen(node, FILES | files, cmd=["tool"])
    assert len([path for path in found if path.startswith("/etc/tool/")]) == 64


async def test_small_layers_on_top_are_wanted_as_a_whole(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(startup_files, "SMALL_LAYER", 2 * CHUNK_SIZE)
    monkeypatch.setattr(startup_files, "MAX_SMALL_LAYERS", 2)
    sizes = (CHUNK_SIZE // 2, 5 * CHUNK_SIZE, CHUNK_SIZE // 3, CHUNK_SIZE + 1, 3 * CHUNK_SIZE)
    made = [
        make_layer(tar(file(b"srv/%d" % number, bytes(size))), Codec.PLAIN)
        for number, size in enumerate(sizes)
    ]
    index = build([[layer.blob] for layer in made])
    lazies = [node.mount(layer)[0] for layer in made]
    await Foresight(index.tree, lazies, RunConfig()).look()
    for lazy in lazies:
        lazy.close()
    assert [len(lazy.foreseen) for lazy in lazies] == [0, 0, 1, 2, 0]


async def test_a_layer_that_is_small_because_it_is_zeros_is_not(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(startup_files, "MAX_FILE", 2 * CHUNK_SIZE)
    layer = make_layer(tar(file(b"srv/zeros", bytes(9 * CHUNK_SIZE))), Codec.GZIP)
    assert layer.table.blob_size <= startup_files.SMALL_LAYER
    index = build([[layer.blob]])
    lazy, _ = node.mount(layer)
    await Foresight(index.tree, [lazy], RunConfig()).look()
    lazy.close()
    assert lazy.foreseen == set()


async def test_libraries_are_found_beside_their_loader(node: Node) -> None:
    files = {
        "usr/lib/x86_64-linux-gnu/ld.so": make_elf(),
        "usr/lib/x86_64-linux-gnu/liba.so": make_elf(),
        "usr/bin/tool": FILES["usr/bin/tool"],
    }
    link = symlink(LOADER[1:], b"../usr/lib/x86_64-linux-gnu/ld.so")
    assert len(await foreseen(node, files, link, cmd=["tool"])) == 3


@pytest.mark.parametrize("wide", [True, False])
async def test_of_a_large_file_what_the_loader_reads_is_wanted(
    node: Node, monkeypatch: pytest.MonkeyPatch, *, wide: bool
) -> None:
    monkeypatch.setattr(startup_files, "MAX_FILE", 2 * CHUNK_SIZE)
    monkeypatch.setattr(startup_files, "MAX_PROGRAM", 8 * CHUNK_SIZE)
    tool = make_elf(wide=wide, writable=(7 * CHUNK_SIZE, CHUNK_SIZE // 2))
    layer = make_layer(tar(file(b"usr/bin/tool", tool + bytes(9 * CHUNK_SIZE))), Codec.PLAIN)
    index = build([[layer.blob]])
    lazy, _ = node.mount(layer)
    await Foresight(index.tree, [lazy], RunConfig(cmd=["tool"])).look()
    lazy.close()
    assert lazy.foreseen == {0, 7}


async def test_of_large_data_the_beginning_is_wanted(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(startup_files, "MAX_FILE", 2 * CHUNK_SIZE)
    layer = make_layer(tar(file(b"srv/data", bytes(9 * CHUNK_SIZE))), Codec.PLAIN)
    index = build([[layer.blob]])
    lazy, _ = node.mount(layer)
    await Foresight(index.tree, [lazy], RunConfig(cmd=["tool", "/srv/data"])).look()
    lazy.close()
    assert lazy.foreseen == {0}


async def test_a_large_program_and_its_library_come_as_a_whole_after_all_else(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library of a library does not."""
    monkeypatch.setattr(startup_files, "MAX_FILE", 2 * CHUNK_SIZE)
    large = bytes(5 * CHUNK_SIZE)
    contents = {
        "usr/bin/tool": b"#!/usr/bin/program\n",
        "usr/bin/program": make_elf(needed=[b"liba.so"]) + large,
        "usr/lib/liba.so": make_elf(needed=[b"libb.so"]) + large,
        "usr/lib/libb.so": make_elf() + large,
    }
    layer = make_layer(tar(*entries(contents)), Codec.PLAIN)
    index = build([[layer.blob]])
    lazy, _ = node.mount(layer)
    order: list[int] = []
    monkeypatch.setattr(lazy, "foresee", order.extend)
    await Foresight(index.tree, [lazy], RunConfig(cmd=["tool"])).look()
    lazy.close()
    extents = FileExtents(index.tree)
    paths = [extents.at(0, chunk * CHUNK_SIZE + 4096, 1) for chunk in dict.fromkeys(order)]
    before = [b"/usr/bin/tool", b"/usr/bin/program", b"/usr/lib/liba.so", b"/usr/lib/libb.so"]
    assert paths == [*before, *5 * [b"/usr/bin/program"], *5 * [b"/usr/lib/liba.so"]]


async def test_a_library_that_exports_much_brings_what_it_needs(node: Node) -> None:
    tool = make_elf(needed=[b"libb.so"], exported=b"x" * (5 << 20))
    files = FILES | {"usr/bin/tool": tool}
    assert "/usr/lib/liba.so" in await foreseen(node, files, cmd=["tool"])


@pytest.mark.parametrize(
    "links",
    [
        (symlink(b"usr/bin/round", b"round"),),
        (symlink(b"usr/bin/round", b"/usr/bin"),),
    ],
    ids=["in a circle", "to a directory"],
)
async def test_what_leads_nowhere_is_no_program(node: Node, links: tuple[bytes, ...]) -> None:
    assert await foreseen(node, FILES, *links, cmd=["round"]) == ALWAYS


async def test_damaged_programs_are_wanted_and_no_more(node: Node) -> None:
    whole = FILES["usr/bin/tool"]
    for cut in (20, 70, len(whole) - 20):
        files = FILES | {"usr/bin/tool": whole[:cut]}
        found = await foreseen(node, files, cmd=["tool"])
        assert "/usr/bin/tool" in found


async def test_there_is_an_end_to_what_an_image_may_ask_for(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(startup_files, "MAX_LOOKUPS", 100)
    needed = [b"lib%d.so" % number for number in range(200)]
    tool = make_elf(interpreter=LOADER, needed=[*needed, b"liba.so"])
    found = await foreseen(node, FILES | {"usr/bin/tool": tool}, cmd=["tool"])
    assert found == ["/etc/passwd", "/usr/bin/tool"]
