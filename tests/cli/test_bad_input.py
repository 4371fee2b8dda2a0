"""Bad input is one line that says what is wrong, a status that is not 0, and no traceback."""

from __future__ import annotations

import gzip
import json
import os
import random
import subprocess
import sys
from functools import partial
from typing import TYPE_CHECKING

import pytest
import trio

from index.convert import FrameWriter
from index.tables import Codec
from tests.support.faults import Fault, FaultRegistry, fault_registry
from tests.support.images import put, sample_image
from tests.support.instance import Instance, firstbyte
from tests.support.layouts import raw_digest, write_layout, write_packed
from tests.support.tars import file, hardlink, symlink, tar

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

GZIP_LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"
COMMAND = (sys.executable, "-m", "snapshotter.cli.main")
NOISE = random.Random(1).randbytes(600_000)


def refused(*arguments: str | Path) -> str:
    """The one line that says why a command failed."""
    done = subprocess.run(
        [*COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 1, (done.stdout, done.stderr)
    assert not done.stdout
    (line,) = done.stderr.splitlines()
    assert line.startswith("firstbyte: ")
    return line


def layout_of(path: Path, blob: bytes, media_type: str = GZIP_LAYER) -> str:
    """An image of one layer whose diffID nothing depends on."""
    write_packed(path, [(blob, raw_digest([blob]))], media_type)
    return f"oci:{path}:latest"


@pytest.mark.parametrize(
    ("blob", "says"),
    [
        (gzip.compress(tar(file(b"data", NOISE)))[:-100_000], "truncated"),
        (gzip.compress(tar(file(b"data", NOISE)))[:-4], "truncated"),
        (gzip.compress(tar(file(b"data", NOISE))) + b"garbage", "gzip"),
        (gzip.compress(tar(file(b"data", NOISE))[:300_000]), "data"),
        (gzip.compress(b"no tar" * 1000), "header"),
        (tar(hardlink(b"link", b"nowhere")), "nowhere"),
        (tar(file(b"file", b"x"), file(b"file/below", b"x")), "file"),
        (tar(symlink(b"loop", b"loop"), file(b"loop/below", b"x")), "loop"),
        (tar(file(b"nul\0"[:3], b"x"))[:700], "nul"),
        (tar(file(b"n" * 300, b"x")), "255"),
    ],
    ids=[
        "truncated gzip",
        "gzip without its end",
        "garbage behind gzip",
        "truncated tar",
        "no tar",
        "link to nowhere",
        "below a file",
        "symlink loop",
        "tar cut in a file",
        "name of 300 bytes",
    ],
)
def test_a_layer_that_no_runtime_could_unpack(tmp_path: Path, blob: bytes, says: str) -> None:
    line = refused("index", "build", layout_of(tmp_path / "bad", blob))
    assert says in line.partition(f" of oci:{tmp_path}/bad")[2]


@pytest.mark.parametrize("codec", [Codec.ZSTD, Codec.LZ4])
def test_truncated_frames(tmp_path: Path, codec: Codec) -> None:
    writer = FrameWriter(codec, level=1)
    blob = writer.feed(tar(file(b"data", NOISE))) + writer.finish()
    refused("index", "build", layout_of(tmp_path / "bad", blob[: len(blob) // 2]))


def test_a_layer_that_unpacks_to_something_else(tmp_path: Path) -> None:
    blob = gzip.compress(tar(file(b"data", NOISE)))
    assert "does not unpack to sha256:" in refused(
        "index", "build", layout_of(tmp_path / "bad", blob)
    )


def test_a_blob_that_was_changed(tmp_path: Path) -> None:
    write_layout(tmp_path / "bad", [tar(file(b"data", NOISE))])
    largest = max((tmp_path / "bad/blobs/sha256").iterdir(), key=lambda path: path.stat().st_size)
    blob = bytearray(largest.read_bytes())
    blob[9] ^= 1  # the operating system in the gzip header: it still unpacks
    largest.write_bytes(blob)
    assert largest.name in refused("index", "build", f"oci:{tmp_path}/bad:latest")


def test_unknown_media_types(tmp_path: Path) -> None:
    name = layout_of(tmp_path / "bad", b"", "application/vnd.example.squashfs")
    assert "application/vnd.example.squashfs" in refused("index", "build", name)


def test_a_manifest_that_is_too_large(tmp_path: Path) -> None:
    write_layout(tmp_path / "bad", [tar()])
    listing = json.loads((tmp_path / "bad/index.json").read_text())
    listing["manifests"][0]["size"] = 5 << 20
    (tmp_path / "bad/index.json").write_text(json.dumps(listing))
    assert "larger than 4 MiB" in refused("index", "build", f"oci:{tmp_path}/bad:latest")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "not a FirstByte file index"),
        (b"text", "not a FirstByte file index"),
        (b"\x89FBX\r\n\x1a\n" + bytes(100), "version 0"),
    ],
)
def test_a_file_that_is_no_index(tmp_path: Path, content: bytes, says: str) -> None:
    (tmp_path / "file").write_bytes(content)
    line = refused("index", "show", tmp_path / "file")
    assert says in line
    assert str(tmp_path / "file") in line


def test_an_index_of_another_image(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_layout(tmp_path / name, [tar(file(name.encode(), NOISE))])
        firstbyte("index", "build", f"oci:{tmp_path}/{name}", "-o", tmp_path / f"{name}.fbx")
    line = refused("index", "verify", tmp_path / "one.fbx", "--image", f"oci:{tmp_path}/two")
    assert "not of the layers of" in line


def test_mounting_with_an_index_of_another_image(here: Instance, tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_layout(tmp_path / name, [tar(file(name.encode(), NOISE))])
    firstbyte("index", "build", f"oci:{tmp_path}/one", "-o", tmp_path / "one.fbx")
    index = str(tmp_path / "one.fbx")
    target = here.directory("refused")
    line = here.fail("mount", f"oci:{tmp_path}/two", target, "--index", index)
    assert "not of the layers of" in line
    with here.mounted(f"oci:{tmp_path}/one", "--index", index) as mounted:
        assert (mounted / "one").read_bytes() == NOISE
    assert "(given)" in here.log()


def test_names_and_files_that_are_not_there(tmp_path: Path) -> None:
    assert "nowhere" in refused("index", "build", f"oci:{tmp_path}/nowhere")
    assert "no such file" in refused("index", "show", "nowhere.fbx")
    assert "no such file" in refused("index", "ls", tmp_path / "nowhere")
    assert "lower" in refused("index", "show", "Registry.example/Upper")
    write_layout(tmp_path / "layout", [tar()])
    assert "no file index" in refused("index", "show", f"oci:{tmp_path}/layout")
    assert "zstd has levels" in refused(
        "convert", f"oci:{tmp_path}/layout", f"oci:{tmp_path}/other", "--level", "99"
    )


def test_a_registry_that_is_not_there() -> None:
    line = refused("index", "show", "127.0.0.1:1/app")
    assert line == (
        "firstbyte: connection to 127.0.0.1:1 failed (Connection refused): "
        "is the registry running, and reachable from here?"
    )


def test_a_traceback_only_with_debug(tmp_path: Path) -> None:
    done = subprocess.run(
        [*COMMAND, "--debug", "index", "build", f"oci:{tmp_path}/nowhere"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1
    assert "Traceback" in done.stderr


@pytest.fixture
async def faulty() -> AsyncIterator[FaultRegistry]:
    async with fault_registry() as registry:
        yield registry


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (Fault(status=404), "not found"),
        (Fault(status=401, headers=(("WWW-Authenticate", 'Basic realm="x"'),)), "docker login"),
        (Fault(status=403), "access denied"),
        (Fault(status=429, headers=(("Retry-After", "900"),)), "too many requests"),
        (Fault(status=200, body=b"x" * (5 << 20)), "4 MiB"),
        (Fault(status=200, body=b"<html>"), "malformed"),
    ],
    ids=["404", "401", "403", "429", "5 MiB manifest", "web page"],
)
async def test_a_registry_that_refuses(faulty: FaultRegistry, fault: Fault, says: str) -> None:
    put(faulty, "app", sample_image(), "latest")
    faulty.inject(fault, path="/manifests/")
    line = await trio.to_thread.run_sync(
        partial(refused, "index", "show", f"{faulty.host}/app:latest")
    )
    assert says in line
    assert f"{faulty.host}/app" in line


@pytest.mark.parametrize(
    "fault",
    [Fault(ignore_range=True), Fault(cut=50_000), Fault(shorten=1000), Fault(status=503)],
    ids=["200 to a range", "closes in mid-body", "too little", "503"],
)
async def test_faults_that_pass_are_not_seen_by_readers(
    faulty: FaultRegistry, here: Instance, fault: Fault
) -> None:
    image = sample_image()
    put(faulty, "app", image, "latest")
    name = f"{faulty.host}/app:latest"
    await trio.to_thread.run_sync(partial(firstbyte, "index", "build", name, "--push"))
    faulty.inject(fault, path="/blobs/", times=3)
    target = here.directory("tree")
    await trio.to_thread.run_sync(here.succeed, "mount", name, target)

    def read_all() -> int:
        return sum(len(path.read_bytes()) for path in target.rglob("*") if path.is_file())

    try:
        assert await trio.to_thread.run_sync(read_all) > 0
    finally:
        await trio.to_thread.run_sync(here.succeed, "umount", target)


def test_a_full_disk_serves_what_it_cannot_keep(here: Instance, tmp_path: Path) -> None:
    content = random.Random(2).randbytes(12 << 20)
    write_layout(tmp_path / "layout", [tar(file(b"data", content))])
    firstbyte("index", "build", f"oci:{tmp_path}/layout", "--push")
    here.root.mkdir(mode=0o700)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", here.root], check=True)
    with here.mounted(f"oci:{tmp_path}/layout") as mounted:
        assert (mounted / "data").read_bytes() == content
    assert "not kept" in here.log()


def test_without_dev_fuse(here: Instance, tmp_path: Path) -> None:
    write_layout(tmp_path / "layout", [tar()])
    target = here.directory("tree")
    script = (
        'mount -t tmpfs none /dev && mknod /dev/null c 1 3 && mknod /dev/urandom c 1 9 && exec "$@"'
    )
    mount = here.command("mount", f"oci:{tmp_path}/layout", target)
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script, "sh", *mount],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "LC_ALL": "C"},
    )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "/dev/fuse" in line
