"""Nothing unverified is ever served: one flipped byte anywhere is refused or fetched again."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest

from index.file import FileIndex
from index.tables import CHUNK_SIZE
from snapshotter.store.cache import CHUNKS as KEPT_CHUNKS
from tests.support.instance import Instance, firstbyte, wait_until
from tests.support.layouts import write_layout
from tests.support.registry import RunningRegistry, skopeo_push
from tests.support.tars import file, tar

SIZE = 3 << 20
CONTENT = random.Random(5).randbytes(SIZE)  # does not compress: blob and raw offsets are alike


@pytest.fixture
def image(tmp_path: Path, registry: RunningRegistry) -> str:
    """An image of one file `/data` with an index, in a repository of the test's own."""
    write_layout(tmp_path / "layout", [tar(file(b"data", CONTENT))])
    reference = registry.reference(tmp_path.name.replace("_", "-"))
    skopeo_push(tmp_path / "layout", reference)
    firstbyte("index", "build", reference, "--push")
    return reference


def layer_of(reference: str) -> str:
    shown = json.loads(firstbyte("index", "show", reference, "--json"))
    digest: str = shown["layers"][0]["digest"]
    return digest


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as damaged:
        damaged.seek(offset)
        (value,) = damaged.read(1)
        damaged.seek(offset)
        damaged.write(bytes([value ^ 1]))


def read(path: Path, offset: int, length: int) -> bytes:
    """Past the page cache of the mount, so that the daemon is asked."""
    with path.open("rb", buffering=0) as opened:
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return os.pread(opened.fileno(), length, offset)


def test_a_flipped_byte_of_a_blob_is_an_error_until_it_is_mended(
    here: Instance, registry: RunningRegistry, image: str
) -> None:
    blob = registry.blob_path(layer_of(image))
    flip(blob, SIZE // 2)
    with here.mounted(image) as mounted:
        assert read(mounted / "data", 0, 1000) == CONTENT[:1000]
        with pytest.raises(OSError, match="Input/output error"):
            read(mounted / "data", SIZE // 2 - 500, 1000)
        assert layer_of(image).removeprefix("sha256:")[:12] in here.log()
        flip(blob, SIZE // 2)
        assert read(mounted / "data", 0, SIZE) == CONTENT


def test_a_flipped_byte_of_an_index_in_the_registry_makes_it_useless(
    here: Instance, registry: RunningRegistry, image: str, tmp_path: Path
) -> None:
    """The image is mounted all the same: the node builds an index of its own."""
    firstbyte("index", "build", image, "-o", tmp_path / "image.fbx")
    packed = (tmp_path / "image.fbx").read_bytes()
    (stored,) = (path for path in registry.storage.rglob("data") if path.read_bytes() == packed)
    flip(stored, len(packed) // 2)
    with here.mounted(image) as mounted:
        assert read(mounted / "data", 0, SIZE) == CONTENT
    assert "is not used" in here.log()


def test_a_flipped_byte_of_an_index_on_the_node_is_noticed(here: Instance, image: str) -> None:
    with here.mounted(image) as mounted:
        assert (mounted / "data").stat().st_size == SIZE
    (stored,) = (here.root / "indexes").iterdir()
    place = FileIndex.open(stored).tree.meta_start + 4096 + 48
    flip(stored, min(place, stored.stat().st_size - 1))
    with here.mounted(image) as mounted:
        assert (mounted / "data").stat().st_size == SIZE
        assert read(mounted / "data", 0, SIZE) == CONTENT
    assert "damaged" in here.log()


def drop_caches() -> None:
    """Make the kernel forget what it has of files, as far as it can."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


@pytest.mark.parametrize(
    ("when", "mode"), [("mounted", "fuse"), ("stopped", "fuse"), ("mounted", "erofs")]
)
def test_a_flipped_byte_of_the_store_is_fetched_again(
    here: Instance, registry: RunningRegistry, tmp_path: Path, when: str, mode: str
) -> None:
    """The daemon keeps some verified chunks in memory, and the kernel pages: the other file pushes
    chunks out of the one, and the other is told to forget.

    (What is local already when EROFS is mounted, the kernel reads by itself.)
    """
    here.mode = mode
    other = random.Random(6).randbytes((KEPT_CHUNKS + 8) * CHUNK_SIZE)
    write_layout(tmp_path / "layout", [tar(file(b"data", CONTENT), file(b"other", other))])
    reference = registry.reference(f"store-{when}")
    skopeo_push(tmp_path / "layout", reference)
    firstbyte("index", "build", reference, "--push")

    def damage() -> None:
        (raw,) = here.root.glob("layers/*/raw")
        flip(raw, SIZE // 2)

    with here.mounted(reference, "--wait-local") as mounted:
        assert read(mounted / "data", 0, SIZE) == CONTENT
        if when == "mounted":
            assert read(mounted / "other", 0, len(other)) == other
            damage()
            drop_caches()
            assert read(mounted / "data", 0, SIZE) == CONTENT
    if when == "stopped":
        wait_until(lambda: not here.has_daemon())
        damage()
        with here.mounted(reference) as mounted:
            assert read(mounted / "data", 0, SIZE) == CONTENT
    assert "is damaged" in here.log()
    assert "fetched again" in here.log()


def test_an_index_that_lies_about_a_file_is_found_out(
    here: Instance, registry: RunningRegistry, tmp_path: Path
) -> None:
    """Somebody pushes another image's tree as this one's: what is fully local is compared."""
    honest, other = tmp_path / "honest", tmp_path / "other"
    write_layout(honest, [tar(file(b"data", CONTENT, mode=0o600))])
    write_layout(other, [tar(file(b"data", CONTENT, mode=0o4755))])
    reference = registry.reference("lied-about")
    skopeo_push(honest, reference)
    push_forged_index(reference, honest, other, tmp_path)
    target = here.directory("tree")
    assert "not what its file index says" in here.fail("mount", reference, target, "--wait-local")
    with pytest.raises(OSError, match="Input/output error"):
        read(target / "data", 0, 1000)
    here.succeed("umount", target)


def push_forged_index(reference: str, honest: Path, other: Path, scratch: Path) -> None:
    """Attach an index with the honest layer tables and the other image's tree."""
    import trio

    from index import format as fbx
    from index.format import Section
    from snapshotter.images import artifact
    from snapshotter.registry.credentials import CredentialStore
    from snapshotter.registry.locations import Locations
    from snapshotter.registry.platform import Platform
    from snapshotter.registry.transport import Transport

    for name, layout in (("honest", honest), ("other", other)):
        firstbyte("index", "build", f"oci:{layout}:latest", "-o", scratch / f"{name}.fbx")
    content = fbx.expand(fbx.read((scratch / "honest.fbx").read_bytes()))
    lies = fbx.expand(fbx.read((scratch / "other.fbx").read_bytes()))
    content[Section.TREE] = lies[Section.TREE]
    packed = fbx.write(fbx.compress(content))

    async def push() -> None:
        async with Transport() as transport:
            locations = Locations(transport, CredentialStore())
            image = await locations.source(reference).resolve(Platform.host())
            sink = locations.sink(reference)
            await artifact.publish(sink, image.descriptor, packed, fbx.index_digest(content))

    trio.run(push)
