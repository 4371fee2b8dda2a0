"""The lazily mounted tree is the tree that an ordinary unpack gives, in every respect."""

from __future__ import annotations

import os
import shutil
import subprocess
import tarfile
from typing import TYPE_CHECKING

import pytest

from snapshotter.demo.image import TAG as SAMPLE_TAG
from tests.support.awkward import TIMELESS, awkward_layers, huge_layers, layers_beyond_umoci
from tests.support.instance import Instance, firstbyte
from tests.support.layouts import raw_digest, seekable, write_layout, write_packed
from tests.support.registry import RunningRegistry, skopeo_push
from tests.support.sample import sample
from tests.support.tars import SECOND, Member, directory, encode, file, hardlink, tar, whiteout
from tests.support.trees import Item, differences, read_tree

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(params=["fuse", "erofs", "native"])
def here(here: Instance, request: pytest.FixtureRequest) -> Instance:
    """An instance that mounts in one mode: all of them show the same."""
    here.mode = request.param
    return here


@pytest.fixture(scope="module")
def awkward(tmp_path_factory: pytest.TempPathFactory) -> Path:
    layout = tmp_path_factory.mktemp("awkward") / "layout"
    write_layout(layout, awkward_layers())
    return layout


@pytest.fixture(scope="module")
def unpacked(awkward: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[bytes, Item]:
    return unpack(awkward, tmp_path_factory.mktemp("unpacked"), TIMELESS)


def unpack(layout: Path, into: Path, timeless: frozenset[bytes]) -> dict[bytes, Item]:
    """The tree that `umoci unpack` makes of an image."""
    bundle = into / "bundle"
    subprocess.run(
        ["umoci", "unpack", "--image", f"{layout}:latest", str(bundle)],
        check=True,
        capture_output=True,
    )
    return read_tree(bundle / "rootfs", timeless=timeless)


def assert_same(found: dict[bytes, Item], expected: dict[bytes, Item]) -> None:
    assert not (lines := differences(found, expected)), "\n".join(lines)


@pytest.fixture(scope="module", params=[True, False], ids=["with index", "without index"])
def pushed(request: pytest.FixtureRequest, registry: RunningRegistry, awkward: Path) -> str:
    reference = registry.reference(f"awkward-{request.param}".lower())
    skopeo_push(awkward, reference)
    if request.param:
        firstbyte("index", "build", reference, "--push")
    return reference


def test_awkward_layers_from_a_registry(
    here: Instance, pushed: str, unpacked: dict[bytes, Item]
) -> None:
    with here.mounted(pushed) as mounted:
        assert_same(read_tree(mounted, timeless=TIMELESS), unpacked)


@pytest.fixture(scope="module", params=["zstd", "lz4"])
def converted(request: pytest.FixtureRequest, registry: RunningRegistry, awkward: Path) -> str:
    reference = registry.reference(f"converted-{request.param}")
    firstbyte("convert", f"oci:{awkward}:latest", reference, "--codec", request.param)
    return reference


def test_awkward_layers_converted(
    here: Instance, converted: str, unpacked: dict[bytes, Item]
) -> None:
    with here.mounted(converted) as mounted:
        assert_same(read_tree(mounted, timeless=TIMELESS), unpacked)


def test_an_image_converted_to_zstd_unpacks_with_other_tools(tmp_path: Path, awkward: Path) -> None:
    """skopeo decompresses our frames to the tars that the configuration promises."""
    firstbyte("convert", f"oci:{awkward}:latest", f"oci:{tmp_path}/zstd:latest")
    subprocess.run(
        [
            "skopeo",
            "copy",
            "--dest-decompress",
            f"oci:{tmp_path}/zstd:latest",
            f"dir:{tmp_path}/plain",
        ],
        check=True,
        capture_output=True,
    )
    sizes = {path.stat().st_size for path in (tmp_path / "plain").iterdir()}
    assert {len(layer) for layer in awkward_layers()} <= sizes


def test_layers_that_are_plain_tars(
    here: Instance, tmp_path: Path, unpacked: dict[bytes, Item]
) -> None:
    write_layout(tmp_path / "plain", awkward_layers(), compress="none")
    with here.mounted(f"oci:{tmp_path}/plain:latest") as mounted:
        assert_same(read_tree(mounted, timeless=TIMELESS), unpacked)


@pytest.fixture(scope="module")
def tall(
    registry: RunningRegistry, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, dict[bytes, Item]]:
    """An image of 120 layers, and its tree. Each layer adds, replaces, links or deletes what lower
    ones gave."""
    layers = [
        tar(
            directory(b"shared", mode=0o700 + number % 8, mtime_ns=number * SECOND),
            file(b"shared/last", b"%d" % number, mtime_ns=number * SECOND),
            file(b"own-%d" % number, bytes([number]) * number * 100, mtime_ns=-number * SECOND),
            *([hardlink(b"link-%d" % number, b"own-%d" % (number - 1))] if number % 3 == 1 else []),
            *([whiteout(b"own-%d" % (number - 2))] if number % 5 == 4 else []),
        )
        for number in range(120)
    ]
    folder = tmp_path_factory.mktemp("tall")
    write_layout(folder / "layout", layers)
    reference = registry.reference("many")
    skopeo_push(folder / "layout", reference)
    firstbyte("index", "build", reference, "--push")
    return reference, unpack(folder / "layout", folder, frozenset())


def test_an_image_of_120_layers(here: Instance, tall: tuple[str, dict[bytes, Item]]) -> None:
    image, expected = tall
    with here.mounted(image) as mounted:
        assert_same(read_tree(mounted), expected)


@pytest.fixture(scope="module")
def demos(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[str, frozenset[bytes], dict[bytes, Item]]:
    """The demo's image, the directories that no layer of it names, and its tree."""
    made = sample(tmp_path_factory)
    layout = tmp_path_factory.mktemp("demos") / "layout"
    shutil.copytree(made.layout, layout)
    image = f"oci:{layout}:{SAMPLE_TAG}"
    firstbyte("index", "build", image, "--push")
    unnamed = directories_that_no_layer_names(layout)
    return image, unnamed, read_tree(made.root, timeless=unnamed)


def test_the_demos_image(
    here: Instance, demos: tuple[str, frozenset[bytes], dict[bytes, Item]]
) -> None:
    """Thousands of real files of real packages."""
    image, unnamed, expected = demos
    assert len(expected) > 3000
    with here.mounted(image) as mounted:
        assert_same(read_tree(mounted, timeless=unnamed), expected)


def directories_that_no_layer_names(layout: Path) -> frozenset[bytes]:
    named: set[bytes] = set()
    parents = {b""}
    for blob in (layout / "blobs/sha256").iterdir():
        if blob.read_bytes()[:2] == b"\x1f\x8b":
            with tarfile.open(blob) as layer:
                paths = [b"/" + os.fsencode(name).lstrip(b"./") for name in layer.getnames()]
            named.update(path.rstrip(b"/") for path in paths)
    for path in named:
        parents.update(path[:at] for at in range(len(path)) if path[at : at + 1] == b"/")
    return frozenset(parents - named)


def test_sparse_files_that_umoci_refuses_are_as_gnu_tar_extracts_them(
    here: Instance, tmp_path: Path
) -> None:
    (layer,) = layers_beyond_umoci()
    write_layout(tmp_path / "layout", [layer])
    extracted = tmp_path / "extracted"
    extracted.mkdir()
    subprocess.run(["tar", "-x", "-C", str(extracted)], input=layer, check=True)
    root = frozenset({b""})  # no entry describes it
    with here.mounted(f"oci:{tmp_path}/layout:latest") as mounted:
        assert_same(read_tree(mounted, timeless=root), read_tree(extracted, timeless=root))


def test_a_sparse_file_over_4_gib(here: Instance, tmp_path: Path) -> None:
    """As GNU tar extracts it, at both ends, around the data and behind 4 GiB."""
    (layer,) = huge_layers()
    write_layout(tmp_path / "layout", [layer])
    subprocess.run(["tar", "-x", "-C", str(tmp_path)], input=layer, check=True)
    expected = (tmp_path / "huge").stat()
    offsets = (
        0,
        2400,
        (1 << 20) - 100,
        (1 << 20) + 1000,
        (4 << 30) - 50,
        expected.st_size - 80_000,
    )
    with here.mounted(f"oci:{tmp_path}/layout:latest") as mounted:
        found = (mounted / "huge").stat()
        assert (found.st_size, found.st_mtime_ns) == (expected.st_size, expected.st_mtime_ns)
        with (mounted / "huge").open("rb") as lazy, (tmp_path / "huge").open("rb") as extracted:
            for offset in offsets:
                assert os.pread(lazy.fileno(), 100_000, offset) == os.pread(
                    extracted.fileno(), 100_000, offset
                )


HUGE = (4 << 30) + 5


@pytest.fixture(scope="module")
def huge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image whose one layer holds a file of HUGE bytes, and one behind it."""
    folder = tmp_path_factory.mktemp("huge")
    size = HUGE
    head = encode(Member(b"big", size=size))
    tail = b"END!!" + bytes(-size % 512) + tar(file(b"behind", b"it"))
    zeros = bytes(4 << 20)
    raw_pieces = [head, *[zeros] * (size // len(zeros)), tail]
    layer = (seekable(raw_pieces), raw_digest(raw_pieces))
    write_packed(folder / "layout", [layer], "application/vnd.oci.image.layer.v1.tar+zstd")
    firstbyte("index", "build", f"oci:{folder}/layout", "--push")
    return folder / "layout"


def test_a_layer_over_4_gib(here: Instance, huge: Path) -> None:
    """Offsets into raw space have more than 32 bits; a file of more than 4 GiB is not sparse."""
    # Mode native waits until all of it is written, and hashed twice: 20 s alone.
    with here.mounted(f"oci:{huge}", seconds=300) as mounted:
        assert (mounted / "behind").read_bytes() == b"it"
        assert (mounted / "big").stat().st_size == HUGE
        with (mounted / "big").open("rb") as lazy:
            assert os.pread(lazy.fileno(), 100, 4 << 30) == b"END!!"
            assert os.pread(lazy.fileno(), 7, (4 << 30) - 5) == b"\0\0\0\0\0EN"
