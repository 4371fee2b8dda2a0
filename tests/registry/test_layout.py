"""OCI layout directories: read, written, shared, and never left half-written."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import trio

from index.errors import FirstByteError, IntegrityError
from snapshotter.registry.errors import (
    InvalidReferenceError,
    LayoutError,
    NotFoundError,
    ProtocolError,
)
from snapshotter.registry.image import body_of
from snapshotter.registry.layout import Layout
from snapshotter.registry.manifest import EMPTY_DESCRIPTOR, Descriptor, Manifest
from snapshotter.registry.platform import Platform
from tests.support.images import digest, push, sample_image

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

AMD64 = Platform("linux", "amd64")


def listed(root: Path) -> list[dict[str, object]]:
    found: list[dict[str, object]] = json.loads((root / "index.json").read_bytes())["manifests"]
    return found


@pytest.mark.parametrize(
    ("text", "name"),
    [("oci:a", "oci:a"), ("oci:/a/b:v1", "oci:/a/b:v1"), ("oci:a:x.io/b:v1", "oci:a:x.io/b:v1")],
)
def test_names(text: str, name: str) -> None:
    """The path ends at the first colon; a tag may have more of them."""
    assert Layout.parse(text).name == name


@pytest.mark.parametrize("text", ["", "oci:", "oci::x", "oci:a:", "a:b", "oci:a\0"])
def test_malformed_names(text: str) -> None:
    """What names no layout is refused."""
    with pytest.raises(InvalidReferenceError):
        Layout.parse(text)


async def test_round_trip(tmp_path: Path) -> None:
    """An image comes back whole, by its tag and, alone, without one."""
    sample = sample_image()
    await push(Layout(tmp_path / "x", "v1"), sample)
    for layout in (Layout(tmp_path / "x", "v1"), Layout(tmp_path / "x")):
        resolved = await layout.resolve(AMD64)
        assert resolved.manifest.raw == sample.manifest.raw
        for layer, data in zip(resolved.manifest.layers, sample.layers, strict=True):
            async with layout.open_range(layer, 10, layer.size - 10) as pieces:
                assert b"".join([piece async for piece in pieces]) == data[10:-10]
            assert await layout.fetch_blob(layer, max_size=layer.size) == data


async def test_umoci_reads_what_we_write(tmp_path: Path) -> None:
    """Another tool unpacks our layout."""
    await push(Layout(tmp_path / "x", "v1"), sample_image(layers=3))
    await trio.run_process(
        ["umoci", "unpack", "--rootless", "--image", f"{tmp_path}/x:v1", f"{tmp_path}/bundle"],
        capture_stdout=True,
        capture_stderr=True,
    )
    found = sorted(path.name for path in (tmp_path / "bundle/rootfs").iterdir())
    assert found == ["file0", "file1", "file2"]


async def test_tags(tmp_path: Path) -> None:
    """A tag is replaced, others stay; without a tag, several images are a question."""
    old, new, other = (sample_image(seed=seed) for seed in (1, 5, 9))
    await push(Layout(tmp_path / "x", "v1"), old)
    await push(Layout(tmp_path / "x", "v2"), other)
    await push(Layout(tmp_path / "x", "v1"), new)
    await push(Layout(tmp_path / "x", "v1"), new)
    assert len(listed(tmp_path / "x")) == 2
    found = await Layout(tmp_path / "x", "v1").resolve(AMD64)
    assert found.manifest.raw == new.manifest.raw
    with pytest.raises(NotFoundError, match="it has v1, v2; add :TAG"):
        await Layout(tmp_path / "x").resolve(AMD64)
    with pytest.raises(NotFoundError, match="no such image"):
        await Layout(tmp_path / "x", "v3").resolve(AMD64)


async def test_one_image_under_two_tags(tmp_path: Path) -> None:
    """Tagging an image again does not take its other name away."""
    sample = sample_image()
    await push(Layout(tmp_path / "x", "v1"), sample)
    await push(Layout(tmp_path / "x", "v2"), sample)
    for tag in ("v1", "v2"):
        found = await Layout(tmp_path / "x", tag).resolve(AMD64)
        assert found.manifest.raw == sample.manifest.raw


async def test_referrers(tmp_path: Path) -> None:
    """Artifacts are found by subject and type, listed once, and never taken for the image."""
    sample = sample_image()
    layout = Layout(tmp_path / "x", "v1")
    await push(layout, sample)
    artifacts = [
        Manifest.build(
            config=EMPTY_DESCRIPTOR,
            layers=[EMPTY_DESCRIPTOR],
            subject=sample.manifest.descriptor,
            artifact_type=kind,
        )
        for kind in ("application/wanted", "application/other")
    ]
    for artifact in (*artifacts, *artifacts):
        await layout.write_manifest(artifact, named=False)
    subject = digest(sample.manifest.raw)
    found = await layout.referrers(subject, "application/wanted")
    assert found == [artifacts[0].descriptor]
    assert await layout.fetch_manifest(found[0]) == artifacts[0]
    assert await layout.referrers(digest(b""), "application/wanted") == []
    assert len(listed(tmp_path / "x")) == 3
    assert (await Layout(tmp_path / "x").resolve(AMD64)).manifest.raw == sample.manifest.raw


async def test_writers_at_once(tmp_path: Path) -> None:
    """Whoever writes at the same time, no entry of index.json is lost."""
    async with trio.open_nursery() as nursery:
        for number in range(12):
            layout = Layout(tmp_path / "x", f"v{number}")
            nursery.start_soon(push, layout, sample_image(seed=number, layers=1, size=10))
    assert len(listed(tmp_path / "x")) == 12


async def test_streamed_blob(tmp_path: Path) -> None:
    """A blob of unknown digest is stored under the one it has."""

    async def stream() -> AsyncIterator[bytes]:
        yield b"one"
        yield b"two"

    layout = Layout(tmp_path / "x")
    written = await layout.add_blob("a/b", stream())
    assert written == Descriptor(media_type="a/b", digest=digest(b"onetwo"), size=6)
    assert await layout.fetch_blob(written, max_size=6) == b"onetwo"


async def test_wrong_blob_leaves_nothing(tmp_path: Path) -> None:
    """A blob that is not what was promised is not there afterwards, nor is a part of it."""
    layout = Layout(tmp_path / "x")
    promised = Descriptor(media_type="a/b", digest=digest(b"right"), size=5)
    for wrong in (b"wrong", b"rightly", b"righ"):
        with pytest.raises(IntegrityError):
            await layout.write_blob(promised, body_of(wrong))
    assert list((tmp_path / "x/blobs/sha256").iterdir()) == []
    assert sorted(path.name for path in (tmp_path / "x").iterdir()) == [
        "blobs",
        "index.json",
        "oci-layout",
    ]


async def test_damage(tmp_path: Path) -> None:
    """Flipped, truncated and missing blobs are told apart and named."""
    sample = sample_image()
    layout = Layout(tmp_path / "x", "v1")
    await push(layout, sample)
    layer = sample.manifest.layers[0]
    path = tmp_path / "x/blobs/sha256" / layer.digest.removeprefix("sha256:")
    content = path.read_bytes()
    path.write_bytes(content[:50] + b"?" + content[51:])
    with pytest.raises(IntegrityError, match=layer.digest):
        await layout.fetch_blob(layer, max_size=layer.size)
    path.write_bytes(content[:-1])
    with pytest.raises(IntegrityError, match="bytes, not"):
        await layout.fetch_blob(layer, max_size=layer.size)
    path.unlink()
    with pytest.raises(NotFoundError, match=layer.digest):
        async with layout.open_range(layer, 0, 1):
            pass


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"schemaVersion":2,"layers":[]}'])
async def test_broken_index_json(tmp_path: Path, content: bytes) -> None:
    """An index.json that is none is one clear error."""
    (tmp_path / "index.json").write_bytes(content)
    with pytest.raises(FirstByteError, match=r"index\.json"):
        await Layout(tmp_path).resolve(AMD64)


async def test_huge_index_json(tmp_path: Path) -> None:
    """An index.json beyond the limit is not read into memory."""
    with (tmp_path / "index.json").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ProtocolError, match="larger than"):
        await Layout(tmp_path).resolve(AMD64)


async def test_no_layout(tmp_path: Path) -> None:
    """A path without a layout says so; one that cannot be a directory, too."""
    with pytest.raises(NotFoundError, match="is it an OCI layout"):
        await Layout(tmp_path / "absent").resolve(AMD64)
    (tmp_path / "file").write_text("")
    with pytest.raises(LayoutError):
        await push(Layout(tmp_path / "file", "v1"), sample_image(layers=1, size=1))
