"""What is written down about views and mounts, for a successor."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from snapshotter.daemon.errors import DaemonError
from snapshotter.daemon.records import MountRecord, Records, ViewRecord
from snapshotter.fuse.view import MAX_SLOT

if TYPE_CHECKING:
    from pathlib import Path

MOUNT = MountRecord(target="/mnt/a", reference="example/a", digest="sha256:00", mode="fuse")


def view(*names: str, image: str = "sha256:00") -> ViewRecord:
    return ViewRecord(image=image, depth=1, plain_http=False, names=list(names))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "serving.json"


def test_a_successor_learns_what_was_mounted(path: Path) -> None:
    records = Records(path)
    records.add_mount(MOUNT)
    records.add_mount(MountRecord(target="/b", reference="b", digest="sha256:01", mode="erofs"))
    records.remove_mount("/b")
    assert Records(path).mounts == [MOUNT]


def test_a_successor_shows_the_same_views_in_the_same_slots(path: Path) -> None:
    records = Records(path)
    records.open_view("x", view("x"))
    records.close_view("x")
    slots = records.open_view("a", view("a", "layer.raw"))
    successor = Records(path)
    assert successor.views == [view("a", "layer.raw")]
    assert successor.open_view("a", view("a", "layer.raw")) == slots


def test_a_slot_is_never_used_again(path: Path) -> None:
    records = Records(path)
    assert records.open_view("a", view("a")) == {"a": 3}
    records.close_view("a")
    assert records.open_view("a", view("a")) == {"a": 4}


def test_views_share_the_slots_of_what_they_share(path: Path) -> None:
    records = Records(path)
    assert records.open_view("a", view("a", "base.raw")) == {"a": 3, "base.raw": 4}
    assert records.open_view("b", view("b", "base.raw")) == {"b": 5, "base.raw": 4}
    assert records.close_view("a") == ["a"]
    assert records.close_view("b") == ["b", "base.raw"]


def test_a_new_mount_starts_afresh(path: Path) -> None:
    records = Records(path)
    records.open_view("a", view("a"))
    records.add_mount(MOUNT)
    records.start_afresh()
    records.serve(b"hello")
    assert (records.views, records.mounts, records.init) == ([], [], b"hello")
    assert Records(path).open_view("b", view("b")) == {"b": 3}


def test_what_needs_no_fuse_mount_stays(path: Path) -> None:
    records = Records(path)
    native = MountRecord(target="/n", reference="n", digest="sha256:02", mode="native")
    for mount in (MOUNT, native):
        records.add_mount(mount)
    records.start_afresh()
    records.serve(b"hello")
    assert Records(path).mounts == [native]


def test_slots_run_out_with_an_error_and_nothing_changes(path: Path) -> None:
    records = Records(path)
    records._file.next_slot = MAX_SLOT
    with pytest.raises(DaemonError, match="restart the daemon"):
        records.open_view("a", view("a", "b"))
    assert records.open_view("a", view("a")) == {"a": MAX_SLOT}
    with pytest.raises(DaemonError):
        records.open_view("b", view("b"))
    assert records.views == [view("a")]


@pytest.mark.parametrize("damage", [b"", b"{", b"\xff", b'{"mounts": 3}', b"[" * 100_000])
def test_a_damaged_file_is_an_empty_one_and_a_warning(
    path: Path, damage: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    path.write_bytes(damage)
    records = Records(path)
    assert (records.mounts, records.init) == ([], b"")
    assert "starts afresh" in caplog.text
    records.add_mount(MOUNT)
    assert Records(path).mounts == [MOUNT]
