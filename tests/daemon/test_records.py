"""What is written down about mounts, for a successor."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from snapshotter.daemon.errors import DaemonError
from snapshotter.daemon.records import MountRecord, Records
from snapshotter.fuse.view import MAX_SLOT

if TYPE_CHECKING:
    from pathlib import Path

RECORD = MountRecord("/mnt/a", "example/a", "sha256:00", 1)


def test_a_successor_learns_what_was_mounted(tmp_path: Path) -> None:
    records = Records(tmp_path / "mounts.json")
    records.add(RECORD)
    records.add(MountRecord("/mnt/b", "example/b", "sha256:01", 2))
    records.remove("/mnt/b")
    assert Records(tmp_path / "mounts.json").take_over() == [RECORD]


def test_a_slot_is_never_used_again_in_one_daemon(tmp_path: Path) -> None:
    records = Records(tmp_path / "mounts.json")
    assert [records.take_slot() for _ in range(3)] == [1, 2, 3]
    records.remove("/mnt/a")
    assert records.take_slot() == 4


def test_slots_run_out_with_an_error(tmp_path: Path) -> None:
    with pytest.raises(DaemonError, match="restart the daemon"):
        exhausted(tmp_path).take_slot()


def exhausted(folder: Path) -> Records:
    """A daemon that has used every slot but one, and then that one."""
    records = Records(folder / "mounts.json")
    records._file.next_slot = MAX_SLOT
    assert records.take_slot() == MAX_SLOT
    return records


@pytest.mark.parametrize("damage", [b"", b"{", b"\xff", b'{"mounts": 3}', b"[" * 100_000])
def test_a_damaged_file_is_an_empty_one_and_a_warning(
    tmp_path: Path, damage: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "mounts.json").write_bytes(damage)
    records = Records(tmp_path / "mounts.json")
    assert records.take_over() == []
    assert "starts afresh" in caplog.text
    records.add(RECORD)
    assert Records(tmp_path / "mounts.json").take_over() == [RECORD]
