"""What the benchmarks measure with."""

from __future__ import annotations

import tarfile
from typing import TYPE_CHECKING

import pytest
import trio

from snapshotter.bench import corpus
from snapshotter.bench.building import build
from snapshotter.bench.errors import BenchError
from snapshotter.bench.synthetic import make_index
from snapshotter.registry.layout import Layout
from snapshotter.registry.platform import Platform
from tests.bench.conftest import SMALL_FILES

if TYPE_CHECKING:
    from pathlib import Path

    from snapshotter.bench.images import StoredImage


def test_a_layer_has_everything_in_its_directory(
    tree: Path, layers: tuple[corpus.RawLayer, ...]
) -> None:
    (layer,) = layers
    with tarfile.open(layer.path) as tar:
        names = tar.getnames()
    root = str(tree).lstrip("/")
    below = {f"{root}/{path.relative_to(tree)}" for path in tree.rglob("*")}
    assert set(names) == {root} | below
    assert layer.entries == len(names) == SMALL_FILES + 5
    assert layer.size == layer.path.stat().st_size


def test_a_limit_bounds_the_bytes_of_files(tree: Path, tmp_path: Path) -> None:
    (layer,) = corpus.pack([tree], 10_000, tmp_path)
    with tarfile.open(layer.path) as tar:
        assert 0 < sum(member.size for member in tar) <= 10_000


def test_a_file_that_is_left_out_is_no_target_of_hard_links(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "a").write_bytes(bytes(2000))
    (source / "b").hardlink_to(source / "a")
    (source / "c").write_bytes(bytes(10))
    (source / "d").hardlink_to(source / "c")
    (layer,) = corpus.pack([source], 1000, tmp_path)
    with tarfile.open(layer.path) as tar:
        kinds = {member.name.rpartition("/")[2]: member.type for member in tar}
    assert kinds == {"source": tarfile.DIRTYPE, "c": tarfile.REGTYPE, "d": tarfile.LNKTYPE}


def test_nothing_to_measure_with_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="no files"):
        corpus.pack([], None, tmp_path)


def test_every_form_is_a_valid_image_of_the_same_tars(images: list[StoredImage]) -> None:
    resolved = [trio.run(Layout(image.layout).resolve, Platform.host()) for image in images]
    assert len({tuple(found.config.rootfs.diff_ids) for found in resolved}) == 1
    assert len({found.manifest.layers[0].digest for found in resolved}) == len(images)
    for image, found in zip(images, resolved, strict=True):
        assert image.size == sum(layer.size for layer in found.manifest.layers)
        assert [blob.stat().st_size for blob in image.blobs] == [
            layer.size for layer in found.manifest.layers
        ]
        index = build(image)  # compares digests and diffIDs
        assert index.layers[0].codec is image.form.codec


def test_a_made_up_index_has_the_files_it_should() -> None:
    index = make_index(1000)
    assert 1000 < index.tree.inode_count < 1300  # directories come on top
    assert make_index(1000).digest == index.digest
