"""What programs see of one image through the kernel: every attribute, every byte."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from index.tree import Extent, Node
from tests.support.nobody import as_nobody
from tests.support.serving import MemoryLayer, directory, regular, served, view_of

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.root

GIB = 1 << 30
SECOND = 1_000_000_000
CAPABILITY = bytes.fromhex("0100000200040000000000000000000000000000")  # cap_net_bind_service=ep
# POSIX ACL, version 2: user::rw-, user:65534:rw-, group::---, mask::rw-, other::---
ACL = bytes.fromhex(
    "0200000001000600ffffffff02000600feff000004000000ffffffff10000600ffffffff20000000ffffffff"
)
BINARY = bytes(range(256))
BIG = bytes(os.urandom(3 << 20))
MANY = [b"name-%05d" % number for number in range(3000)]


def kinds() -> dict[bytes, Node]:
    """One node of every kind, with attributes at the edges of what can be stored."""
    linked = regular(5, Extent(0, 0, 0, 5))
    linked.nlink = 2
    huge = regular(5 * GIB, Extent(0, 0, 0, 512), Extent(5 * GIB - 512, 0, 512, 512))
    return {
        b"linked": linked,
        b"linked-too": linked,
        b"huge": huge,
        b"empty": regular(0),
        b"setuid": Node(stat.S_IFREG | 0o6755),
        b"sticky": directory({}, mode=0o1777),
        b"old": Node(stat.S_IFREG | 0o600, mtime_ns=-2 * SECOND + 123_456_789),
        b"late": Node(stat.S_IFREG | 0o600, mtime_ns=5_000_000_000 * SECOND + 999_999_999),
        b"owned": Node(stat.S_IFREG | 0o640, uid=4_000_000_000, gid=3_000_000_000),
        b"null": Node(stat.S_IFCHR | 0o666, rdev=(1, 3)),
        b"block": Node(stat.S_IFBLK | 0o660, rdev=(4095, (1 << 20) - 1)),
        b"fifo": Node(stat.S_IFIFO | 0o644),
        b"symlink": Node(stat.S_IFLNK | 0o777, target=b"no\xffwhere", size=8),
        b"attributes": Node(
            stat.S_IFREG | 0o644,
            xattrs={
                b"user.binary": BINARY,
                b"user.empty": b"",
                b"trusted.\xff": b"not text",
                b"security.capability": CAPABILITY,
            },
        ),
        b"acl": Node(stat.S_IFREG | 0o660, xattrs={b"system.posix_acl_access": ACL}),
        b"\xff\xfe not text": regular(0),
        b"n" * 255: regular(0),
        b"many": directory({name: regular(0) for name in MANY}),
    }


@pytest.fixture(scope="module")
def mount() -> Iterator[Path]:
    """The root of an image of all kinds, and of a file `big`, mounted where anybody can look."""
    head = b"hello" + bytes(507) + b"t" * 512
    layers = [MemoryLayer(head), MemoryLayer(BIG)]
    big = regular(len(BIG), Extent(0, 1, 0, len(BIG)))
    view = view_of(directory({**kinds(), b"big": big}), layers)
    mountpoint = Path(tempfile.mkdtemp(prefix="firstbyte-"))
    mountpoint.chmod(0o755)  # pytest's own directories are closed to others
    with served(mountpoint, view):
        yield mountpoint / "image"
    mountpoint.rmdir()


def at(mount: Path, name: bytes) -> bytes:
    return os.fsencode(mount) + b"/" + name


@pytest.mark.parametrize("name", sorted(kinds()), ids=repr)
def test_stat_tells_what_the_image_holds(mount: Path, name: bytes) -> None:
    node = kinds()[name]
    found = os.lstat(at(mount, name))
    assert found.st_mode == node.mode
    assert (found.st_uid, found.st_gid) == (node.uid, node.gid)
    assert found.st_mtime_ns == node.mtime_ns
    assert found.st_nlink == node.nlink
    assert (os.major(found.st_rdev), os.minor(found.st_rdev)) == node.rdev
    if not node.is_dir:
        assert found.st_size == node.size
        assert found.st_blocks == -(-node.size // 512)


def test_hard_links_are_one_inode(mount: Path) -> None:
    one, other = os.stat(mount / "linked"), os.stat(mount / "linked-too")
    assert (one.st_ino, one.st_dev, one.st_nlink) == (other.st_ino, other.st_dev, 2)
    assert one.st_ino != os.stat(mount / "empty").st_ino


def test_symlinks_give_their_bytes(mount: Path) -> None:
    assert os.readlink(at(mount, b"symlink")) == b"no\xffwhere"


def test_device_nodes_work(mount: Path) -> None:
    """The mount allows devices, as the file system of an ordinary unpack does."""
    assert (mount / "null").read_bytes() == b""


def test_a_directory_lists_every_name_once(mount: Path) -> None:
    """3 000 entries are many READDIRPLUS requests, each continuing where the last one ended."""
    assert sorted(os.listdir(at(mount, b"many"))) == MANY
    assert sorted(os.listdir(os.fsencode(mount))) == sorted([*kinds(), b"big"])


def test_a_listing_holds_the_dots(mount: Path) -> None:
    listing = subprocess.run(["ls", "-fa", mount / "sticky"], capture_output=True, check=True)
    assert sorted(listing.stdout.split()) == [b".", b".."]


def test_a_listing_can_be_left_and_taken_up_again(mount: Path) -> None:
    """Two readers of one directory do not disturb each other."""
    with os.scandir(at(mount, b"many")) as one, os.scandir(at(mount, b"many")) as other:
        first = [next(one).name for _ in range(1000)]
        second = [entry.name for entry in other]
        first += [entry.name for entry in one]
    assert sorted(first) == sorted(second) == MANY


def test_a_missing_name_is_missing(mount: Path) -> None:
    for _ in range(2):  # the second time from the kernel's memory
        with pytest.raises(FileNotFoundError):
            os.stat(mount / "no such name")


def test_xattrs_are_byte_for_byte(mount: Path) -> None:
    path = at(mount, b"attributes")
    names = {os.fsencode(name) for name in os.listxattr(path)}
    assert names == {b"user.binary", b"user.empty", b"trusted.\xff", b"security.capability"}
    assert os.getxattr(path, b"user.binary") == BINARY
    assert os.getxattr(path, b"user.empty") == b""
    assert os.getxattr(path, b"trusted.\xff") == b"not text"
    assert os.getxattr(path, b"security.capability") == CAPABILITY
    with pytest.raises(OSError, match=os.strerror(errno.ENODATA)):
        os.getxattr(path, b"user.other")
    with pytest.raises(OSError, match=os.strerror(errno.ENODATA)):
        os.getxattr(at(mount, b"empty"), b"user.binary")
    assert os.listxattr(at(mount, b"empty")) == []


TRY_TO_READ = """
try:
    open(sys.argv[1], "rb").read()
    print("read")
except OSError as error:
    print(type(error).__name__)
"""


def read_as_nobody(path: bytes) -> str:
    done = as_nobody(TRY_TO_READ, path, imports="import sys")
    return done.stdout.strip() or done.stderr


def test_the_kernel_checks_permissions(mount: Path) -> None:
    assert read_as_nobody(at(mount, b"empty")) == "read"
    assert read_as_nobody(at(mount, b"owned")) == "PermissionError"


def test_access_control_lists_are_shown_and_enforced(mount: Path) -> None:
    """Group and others may do nothing with this file; the list lets nobody in, by number."""
    path = at(mount, b"acl")
    assert os.getxattr(path, b"system.posix_acl_access") == ACL
    assert read_as_nobody(path) == "read"


def test_nothing_can_be_written(mount: Path) -> None:
    attempts = [
        lambda: os.open(mount / "empty", os.O_WRONLY),
        lambda: os.open(mount / "empty", os.O_RDWR),
        lambda: os.open(mount / "new", os.O_CREAT | os.O_WRONLY),
        lambda: os.unlink(mount / "empty"),
        lambda: os.mkdir(mount / "new"),
        lambda: os.chmod(mount / "empty", 0o600),
        lambda: os.setxattr(mount / "empty", b"user.new", b""),
    ]
    for attempt in attempts:
        with pytest.raises(OSError, match=os.strerror(errno.EROFS)):
            attempt()


def test_statfs_adds_up_what_is_mounted(mount: Path) -> None:
    found = os.statvfs(mount)
    assert found.f_blocks * found.f_frsize >= len(BIG)
    assert found.f_bfree == found.f_ffree == 0
    assert found.f_files >= len(kinds()) - 1 + len(MANY)
    assert found.f_namemax == 255


def test_a_file_over_4_gib_is_read_at_both_ends_and_in_its_hole(mount: Path) -> None:
    with (mount / "huge").open("rb", buffering=0) as file:
        assert os.pread(file.fileno(), 5, 0) == b"hello"
        assert os.pread(file.fileno(), 4096, 3 * GIB) == bytes(4096)
        assert os.pread(file.fileno(), 4096, 5 * GIB - 512) == b"t" * 512
        assert os.pread(file.fileno(), 4096, 5 * GIB) == b""


@settings(max_examples=60)
@given(
    reads=st.lists(
        st.tuples(st.integers(0, len(BIG) + 4096), st.integers(0, 1 << 20)), min_size=1, max_size=8
    ),
    evict=st.booleans(),
)
def test_random_reads_give_the_files_bytes(
    mount: Path, reads: list[tuple[int, int]], evict: bool
) -> None:
    with (mount / "big").open("rb", buffering=0) as file:
        if evict:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        for offset, size in reads:
            assert os.pread(file.fileno(), size, offset) == BIG[offset : offset + size]
