"""What a Java virtual machine will read is known before it starts."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import pytest

from index.builder import build
from index.extents import FileExtents
from index.tables import CHUNK_SIZE, Codec
from snapshotter.images import startup_files
from snapshotter.images.foresight import Foresight
from snapshotter.registry.manifest import RunConfig
from tests.support.blobs import make_layer
from tests.support.elves import make_elf
from tests.support.foreseeing import entries, foreseen
from tests.support.tars import symlink, tar

if TYPE_CHECKING:
    from tests.support.fetching import Node

LOADER = b"/lib64/ld.so"
HOME = "usr/lib/jvm/21"


def modules(*, slots: int = 10, locations: int = 100, strings: int = 100) -> bytes:
    """The head of a jimage file whose tables have these sizes."""
    return struct.pack("<IIIIIII", 0xCAFEDADA, 1 << 16, 0, slots, slots, locations, strings)


RUNTIME = {
    f"{HOME}/bin/java": make_elf(interpreter=LOADER, needed=[b"libz.so"]),
    f"{HOME}/conf/security/java.security": b"settings",
    f"{HOME}/lib/jvm.cfg": b"-server KNOWN\n",
    f"{HOME}/lib/libjava.so": make_elf(),
    f"{HOME}/lib/modules": modules(),
    f"{HOME}/lib/server/classes.jsa": b"classes",
    f"{HOME}/lib/server/libjvm.so": make_elf(needed=[b"libm.so"]),
    "lib64/ld.so": make_elf(),
    "usr/lib/libm.so": make_elf(),
    "usr/lib/libz.so": make_elf(),
}
FILES = {
    **RUNTIME,
    f"{HOME}/lib/libawt.so": make_elf(),
    f"{HOME}/lib/src.zip": b"sources",
    "bin/sh": make_elf(),
    "opt/app/app.jar": b"classes",
    "opt/app/other.jar": b"classes",
    "opt/app/readme": b"words",
    "opt/server/bin/first.jar": b"classes",
    "opt/server/bin/start.sh": b'#!/bin/sh\nexec "$JAVA_HOME/bin/java" Server\n',
    "opt/server/bin/stop.sh": b"#!/bin/sh\nkill 1\n",
    "opt/server/lib/second.jar": b"classes",
    "opt/server/work/third.jar": b"classes",
}
ALL_OF_IT = [f"/{path}" for path in RUNTIME]
ON_PATH = [f"PATH=/{HOME}/bin"]
SERVER = [f"JAVA_HOME=/{HOME}", "SERVER_HOME=/opt/server"]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"cmd": ["java", "-version"], "env": ON_PATH}, []),
        (
            {"cmd": ["java", "-jar", "app.jar"], "working_dir": "/opt/app", "env": ON_PATH},
            ["/opt/app/app.jar"],
        ),
        (
            {"cmd": ["java", "-cp", "/opt/app/*:/opt/server/work/third.jar", "A"], "env": ON_PATH},
            ["/opt/app/app.jar", "/opt/app/other.jar", "/opt/server/work/third.jar"],
        ),
        (
            {"cmd": ["java", "A"], "env": [*ON_PATH, "CLASSPATH=/opt/app/other.jar"]},
            ["/opt/app/other.jar"],
        ),
        (
            {"cmd": ["/opt/server/bin/start.sh"], "env": SERVER},
            [
                "/bin/sh",
                "/opt/server/bin/first.jar",
                "/opt/server/bin/start.sh",
                "/opt/server/lib/second.jar",
            ],
        ),
        (
            {"cmd": ["/opt/server/bin/start.sh"], "env": ON_PATH},
            ["/bin/sh", "/opt/server/bin/start.sh"],
        ),
    ],
    ids=lambda value: str(value)[:40],
)
async def test_the_machine_and_its_archives_are_foreseen(
    node: Node, config: dict[str, list[str] | str], expected: list[str]
) -> None:
    assert await foreseen(node, FILES, **config) == sorted([*ALL_OF_IT, *expected])


async def test_a_script_that_does_not_speak_of_java_runs_none(node: Node) -> None:
    found = await foreseen(node, FILES, cmd=["/opt/server/bin/stop.sh"], env=SERVER)
    assert found == ["/bin/sh", "/opt/server/bin/stop.sh"]


async def test_it_is_found_through_the_links_of_a_distribution(node: Node) -> None:
    links = [
        symlink(b"usr/bin/java", b"/etc/alternatives/java"),
        symlink(b"etc/alternatives/java", f"/{HOME}/bin/java".encode()),
    ]
    found = await foreseen(node, FILES, *links, cmd=["java"], env=["PATH=/usr/bin"])
    assert found == sorted(ALL_OF_IT)


async def test_a_program_of_that_name_without_a_machine_is_a_program(node: Node) -> None:
    files = {"usr/bin/java": make_elf(), "usr/lib/modules": modules(), "app.jar": b"classes"}
    assert await foreseen(node, files, cmd=["java", "A"]) == ["/usr/bin/java"]


async def chunks(node: Node, files: dict[str, bytes], name: str, *command: str) -> list[int]:
    """Which chunks of a file a start of a command will read."""
    layer = make_layer(tar(*entries(files)), Codec.PLAIN)
    index = build([[layer.blob]])
    lazy, _ = node.mount(layer)
    await Foresight(index.tree, [lazy], RunConfig(cmd=[*command], env=ON_PATH)).look()
    lazy.close()
    extents = FileExtents(index.tree)
    wanted = f"/{name}".encode()
    of_file = [
        chunk
        for chunk in range(layer.table.chunk_count)
        if extents.at(0, chunk * CHUNK_SIZE + 4096, 1) == wanted
    ]
    return [number for number, chunk in enumerate(of_file) if chunk in lazy.foreseen]


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        (modules(slots=100, locations=5000, strings=9000), [0]),
        (modules(slots=50_000, locations=200_000, strings=100_000), [0, 1, 2]),
        (modules(slots=0xFFFFFFFF, locations=0xFFFFFFFF), [0, 1, 2, 3, 4]),  # no more of any file
        (bytes(28), []),
    ],
)
async def test_of_its_modules_the_tables_are_foreseen(
    node: Node, monkeypatch: pytest.MonkeyPatch, head: bytes, expected: list[int]
) -> None:
    monkeypatch.setattr(startup_files, "MAX_FILE", 1 << 20)
    name = f"{HOME}/lib/modules"
    files = {**RUNTIME, name: head + bytes(6 * CHUNK_SIZE - 1000 - len(head))}
    assert await chunks(node, files, name, "java") == expected


async def test_of_an_archive_that_is_too_large_its_directory_is(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(startup_files, "MAX_FILE", 2 << 20)
    files = {**RUNTIME, "app.jar": bytes(12 * CHUNK_SIZE - 1000)}
    assert await chunks(node, files, "app.jar", "java", "-jar", "app.jar") == [0, 8, 9, 10, 11]


async def test_of_a_machine_that_is_too_large_its_beginning_is(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(startup_files, "MAX_FILE", 1 << 20)
    name = f"{HOME}/lib/server/libjvm.so"
    machine = make_elf()
    files = {**RUNTIME, name: machine + bytes(8 * CHUNK_SIZE - 1000 - len(machine))}
    assert await chunks(node, files, name, "java") == [0, 1, 2, 3, 4]
