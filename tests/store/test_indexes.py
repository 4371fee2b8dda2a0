"""File indexes and image records are on the node as a whole or not at all."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import msgspec
import pytest

from index.errors import FormatError
from snapshotter.store.durable import write_file
from snapshotter.store.errors import StoreError
from snapshotter.store.images import ImageRecord, ImageStore
from snapshotter.store.indexes import IndexStore

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

DIGEST = hashlib.sha256(b"index").digest()
MANIFEST = b'{"schemaVersion": 2}'
RECORD = ImageRecord(
    reference="localhost:5000/demo:latest",
    manifest_digest=f"sha256:{hashlib.sha256(MANIFEST).hexdigest()}",
    manifest=MANIFEST,
    config=b"{}\xff",
    index_digest=DIGEST,
    trust="referrer",
)


def test_an_index_is_found_by_its_digest_until_it_is_removed(tmp_path: Path) -> None:
    indexes = IndexStore(tmp_path)
    assert indexes.get(DIGEST) is None
    path = indexes.put(DIGEST, b"content")
    assert path.read_bytes() == b"content"
    assert IndexStore(tmp_path).get(DIGEST) == path
    indexes.remove(DIGEST)
    indexes.remove(DIGEST)
    assert indexes.get(DIGEST) is None


def test_an_index_may_come_in_pieces(tmp_path: Path) -> None:
    path = IndexStore(tmp_path).put(DIGEST, iter([b"a", b"bc"]))
    assert path.read_bytes() == b"abc"


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    indexes = IndexStore(tmp_path)
    path = indexes.put(DIGEST, b"old")

    def broken() -> Iterator[bytes]:
        yield b"new"
        raise FormatError("bad")

    with pytest.raises(FormatError):
        indexes.put(DIGEST, broken())
    assert [file.read_bytes() for file in path.parent.iterdir()] == [b"old"]


def test_leftovers_of_a_crash_are_removed(tmp_path: Path) -> None:
    IndexStore(tmp_path)
    (tmp_path / "indexes" / ".new-1234").write_bytes(b"half")
    IndexStore(tmp_path)
    assert list((tmp_path / "indexes").iterdir()) == []


def test_a_directory_that_cannot_be_written_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"cannot write .*gone/file"):
        write_file(tmp_path / "gone" / "file", [b""])
    (tmp_path / "indexes").write_bytes(b"a file where a directory should be")
    with pytest.raises(StoreError, match="cannot create"):
        IndexStore(tmp_path)


def test_an_image_record_comes_back_as_it_was(tmp_path: Path) -> None:
    images = ImageStore(tmp_path)
    assert images.get(RECORD.manifest_digest) is None
    images.put(RECORD)
    assert ImageStore(tmp_path).get(RECORD.manifest_digest) == RECORD
    renamed = msgspec.structs.replace(RECORD, reference="other:1")
    images.put(renamed)
    assert images.all() == [renamed]
    images.remove(RECORD.manifest_digest)
    assert images.all() == []


@pytest.mark.parametrize("damage", ["truncated", "other manifest", "not JSON"])
def test_a_damaged_record_counts_as_none_and_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    images = ImageStore(tmp_path)
    images.put(RECORD)
    path = next((tmp_path / "images").iterdir())
    content = {
        "truncated": path.read_bytes()[:-5],
        "other manifest": msgspec.json.encode(msgspec.structs.replace(RECORD, manifest=b"{}")),
        "not JSON": b"\0\0",
    }[damage]
    path.write_bytes(content)
    assert images.get(RECORD.manifest_digest) is None
    assert images.all() == []
    assert str(path) in caplog.text


@pytest.mark.parametrize("digest", ["", "sha256:../../etc/passwd", "sha512:" + "0" * 64])
def test_only_sha256_digests_name_images(tmp_path: Path, digest: str) -> None:
    with pytest.raises(FormatError):
        ImageStore(tmp_path).get(digest)
