"""Whom an image's workload runs as."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from snapshotter.demo.accounts import Account, find_user
from snapshotter.demo.errors import DemoError

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", Account(0, 0, (), "/root")),
        ("root", Account(0, 0, (), "/root")),
        ("app", Account(1234, 77, (88,), "/home/app")),
        ("1234", Account(1234, 77, (88,), "/home/app")),
        ("app:extra", Account(1234, 88, (), "/home/app")),
        ("app:5", Account(1234, 5, (), "/home/app")),
        ("4321", Account(4321, 0, (), "/")),
        ("4321:team", Account(4321, 77, (), "/")),
    ],
)
def test_names_and_numbers_are_found(rootfs: Path, text: str, expected: Account) -> None:
    assert find_user(rootfs, text) == expected


def test_a_number_needs_no_account_files(tmp_path: Path) -> None:
    assert find_user(tmp_path, "7:8") == Account(7, 8, (), "/")
    assert find_user(tmp_path, "") == Account(0, 0, (), "/")


@pytest.mark.parametrize("text", ["nobody-here", "app:no-such-group"])
def test_unknown_names_are_errors(rootfs: Path, text: str) -> None:
    with pytest.raises(DemoError, match=r"does not know|does not"):
        find_user(rootfs, text)


def test_lines_that_are_no_accounts_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/passwd").write_text("\n+::::\na:x:one:1::/:\nb:x:2:3::/b:/bin/sh\n")
    assert find_user(tmp_path, "b") == Account(2, 3, (), "/b")
    with pytest.raises(DemoError):
        find_user(tmp_path, "a")


def test_account_files_that_lead_out_of_the_image_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/passwd").symlink_to("/etc/passwd")
    with pytest.raises(DemoError):
        find_user(tmp_path, "daemon")
