"""The kernel reads from our images what the tree they were made of says.

Userspace tools cannot judge here: fsck.erofs and dump.erofs of erofs-utils 1.5 know only blocks of
the page size, the 512-byte blocks of our images came with 1.6.
"""

from __future__ import annotations

import os
import random
import stat
import struct
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings

from index.erofs.reader import Image
from index.erofs.validate import validate
from index.erofs.writer import write
from index.tree import Extent, Node, walk
from tests.support.erofs_trees import (
    LAYERS,
    assert_holds,
    content,
    directory,
    regular,
    symlink,
    trees,
)
from tests.support.kernel_erofs import mounted

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

pytestmark = pytest.mark.root

LAYER = random.Random(0).randbytes(512 * 4000)


@contextmanager
def on_kernel(root: Node, layers: Sequence[bytes], tmp_path: Path) -> Iterator[Path]:
    """The mounted tree, after our own reader and validator agreed."""
    sizes = [len(layer) for layer in layers]
    data = write(root, sizes)
    validate(Image(data), sizes)
    (tmp_path / "image").write_bytes(data)
    paths = []
    for number, layer in enumerate(layers):
        paths.append(tmp_path / f"layer{number}")
        paths[-1].write_bytes(layer)
    target = tmp_path / "mnt"
    target.mkdir()
    with mounted(tmp_path / "image", paths, target):
        yield target


def assert_same(top: Path, root: Node, layers: Sequence[bytes]) -> None:
    inodes: dict[Node, int] = {}
    for path, node in walk(root):
        found = os.fsencode(top) + path
        info = os.lstat(found)
        assert (info.st_mode, info.st_uid, info.st_gid) == (node.mode, node.uid, node.gid), path
        assert (info.st_mtime_ns, info.st_nlink) == (node.mtime_ns, node.nlink), path
        assert inodes.setdefault(node, info.st_ino) == info.st_ino
        xattrs = {
            os.fsencode(name): os.getxattr(found, name, follow_symlinks=False)
            for name in os.listxattr(found, follow_symlinks=False)
        }
        assert xattrs == node.xattrs, path
        if node.is_dir:
            assert sorted(os.listdir(found)) == sorted(node.children)
            continue
        assert info.st_size == node.size
        if stat.S_ISLNK(node.mode):
            assert os.readlink(found) == node.target
        elif stat.S_ISREG(node.mode):
            assert Path(os.fsdecode(found)).read_bytes() == content(node, layers), path
        else:
            assert (os.major(info.st_rdev), os.minor(info.st_rdev)) == node.rdev
    assert len(set(inodes.values())) == len(inodes)


def test_kernel_reads_every_kind_of_inode(tmp_path: Path) -> None:
    acl = struct.pack("<I" + "HHI" * 5, 2, 1, 7, ~0 & 0xFFFFFFFF, 2, 6, 70000, 4, 5, 0xFFFFFFFF,
                      16, 7, 0xFFFFFFFF, 32, 0, 0xFFFFFFFF)  # fmt: skip
    linked = regular(700, Extent(0, 0, 512, 700), nlink=3)
    label = {b"security.label": b"system_u:object_r:container_file_t:s0"}
    root = directory(
        {
            b"empty": regular(0, mtime_ns=-1),
            b"small": regular(5, Extent(0, 0, 0, 5), uid=70000, gid=4_000_000_000),
            b"to the end": regular(1024, Extent(0, 0, len(LAYER) - 1024, 1024)),
            b"setuid": Node(stat.S_IFREG | 0o6755, mtime_ns=2**33 * 10**9 + 123_456_789),
            b"linked": linked,
            b"!before-dots": linked,
            b"\xff\xfe not text": regular(),
            b"x" * 255: regular(),
            b"null": Node(stat.S_IFCHR | 0o666, rdev=(1, 3)),
            b"whiteout": Node(stat.S_IFCHR, rdev=(0, 0)),
            b"disk": Node(stat.S_IFBLK | 0o660, rdev=(0xFFF, 0xFFFFF)),
            b"pipe": Node(stat.S_IFIFO | 0o600),
            b"socket": Node(stat.S_IFSOCK | 0o755),
            b"link": symlink(b"small"),
            b"long link": symlink(b"a/" * 2000),
            b"block link": symlink(b"b" * 447),
            b"link with xattrs": symlink(b"c" * 300, xattrs={b"trusted.x": b"v" * 400}),
            b"acl": directory(
                {b"again": linked},
                mode=0o1770,
                xattrs={b"system.posix_acl_access": acl, b"system.posix_acl_default": acl},
            ),
            b"capable": regular(
                0, xattrs={b"security.capability": bytes.fromhex("0100000200040000" + "00" * 12)}
            ),
            b"many xattrs": regular(
                600,
                Extent(0, 0, 1024, 600),
                xattrs={b"user.n%d" % n: b"\0\xff" * n for n in range(300)},
            ),
            b"big xattr": regular(0, xattrs={b"trusted.big": b"\x01" * 65535}),
            b"opaque": directory({}, xattrs={b"trusted.overlay.opaque": b"y"}),
            b"l1": regular(0, xattrs=label),
            b"l2": regular(9, Extent(0, 0, 512, 9), xattrs=label),
            b"l3": directory({}, xattrs=label | {b"user.own": b"1"}),
        },
        mtime_ns=1_700_000_000_999_999_999,
    )
    with on_kernel(root, [LAYER], tmp_path) as top:
        assert_same(top, root, [LAYER])


@settings(max_examples=30)
@given(root=trees())
def test_kernel_reads_any_tree(root: Node, tmp_path_factory: pytest.TempPathFactory) -> None:
    for _, node in walk(root):
        # The kernel hides user.* of special files and wants ACLs to be well-formed.
        node.xattrs = {
            name: value
            for name, value in node.xattrs.items()
            if name.startswith((b"trusted.", b"security."))
        }
    with on_kernel(root, LAYERS, tmp_path_factory.mktemp("tree")) as top:
        assert_same(top, root, LAYERS)


def test_kernel_reads_sparse_and_scattered_files(tmp_path: Path) -> None:
    other = random.Random(1).randbytes(1000)
    layers = [LAYER, other]
    root = directory(
        {
            b"hole": regular(100_000),
            b"data, hole": regular(100_000, Extent(0, 0, 5120, 512)),
            b"hole, data": regular(4096 + 100, Extent(4096, 0, 5120, 100)),
            b"two layers": regular(1536 + 488, Extent(0, 0, 1024, 1536), Extent(1536, 1, 0, 488)),
            b"backwards": regular(1024, Extent(0, 0, 512, 512), Extent(512, 0, 0, 512)),
            b"big chunks": regular(
                1 << 20, Extent(0, 0, 0, 1 << 18), Extent(3 << 18, 0, 1 << 19, 1 << 18)
            ),
            b"embedded": Node(
                stat.S_IFREG | 0o644,
                size=5000,
                extents=(Extent(1024, 0, 512, 1024),),
                embedded=((0, b"a" * 512), (512, b"b" * 512), (4608, b"c" * 392)),
            ),
        }
    )
    with on_kernel(root, layers, tmp_path) as top:
        assert_same(top, root, layers)
        assert_holds(Image((tmp_path / "image").read_bytes()), root, layers)


def test_kernel_reads_a_sparse_file_of_more_than_4_gib(tmp_path: Path) -> None:
    far = 9 << 30
    big = regular(far + 700, Extent(0, 0, 0, 4096), Extent(far, 0, 8192, 700))
    whole = regular(5 << 30, Extent(0, 1, 512, 5 << 30))
    root = directory({b"sparse": big, b"whole": whole})
    sizes = [len(LAYER), (5 << 30) + 512]
    image = write(root, sizes)
    validate(Image(image), sizes)
    (tmp_path / "image").write_bytes(image)
    (tmp_path / "layer0").write_bytes(LAYER)
    with (tmp_path / "layer1").open("wb") as layer:
        layer.truncate(sizes[1])
        layer.seek(sizes[1] - 3)
        layer.write(b"end")
    (tmp_path / "mnt").mkdir()
    devices = [tmp_path / "layer0", tmp_path / "layer1"]
    with mounted(tmp_path / "image", devices, tmp_path / "mnt") as top:
        with (top / "sparse").open("rb") as file:
            assert file.read(5000) == LAYER[:4096] + bytes(904)
            file.seek(5 << 30)
            assert file.read(10) == bytes(10)
            file.seek(far - 2)
            assert file.read() == bytes(2) + LAYER[8192 : 8192 + 700]
        with (top / "whole").open("rb") as file:
            file.seek(-3, os.SEEK_END)
            assert file.read() == b"end"
            assert file.tell() == 5 << 30


@pytest.mark.parametrize("size", [12, 255])
def test_kernel_finds_every_name_of_a_large_directory(tmp_path: Path, size: int) -> None:
    names = [b"%05d" % (number * 7919 % 100_000) for number in range(5000)]
    root = directory({name.ljust(size, b"-"): regular(0, uid=int(name)) for name in names})
    with on_kernel(root, [], tmp_path) as top:
        assert_same(top, root, [])
        for absent in (b"", b"0", b"99999", b"50000-"):
            assert not os.path.lexists(os.fsencode(top) + b"/" + absent.ljust(size, b"+"))


def test_kernel_descends_3000_levels(tmp_path: Path) -> None:
    root = bottom = directory()
    for level in range(3000):
        bottom.children[b"d%d" % level] = below = directory(uid=level)
        bottom.nlink = 3
        bottom = below
    with on_kernel(root, [], tmp_path) as top:
        here = os.open(top, os.O_RDONLY)
        for level in range(3000):
            (name,) = os.listdir(here)
            below_here = os.open(name, os.O_RDONLY, dir_fd=here)
            os.close(here)
            here = below_here
            assert os.fstat(here).st_uid == level
        assert os.listdir(here) == []
        os.close(here)


def test_kernel_counts_more_than_65535_links(tmp_path: Path) -> None:
    file = regular(0, nlink=70_000)
    root = directory({b"%d" % number: file for number in range(70_000)})
    with on_kernel(root, [], tmp_path) as top:
        assert (top / "69999").stat().st_nlink == 70_000
        assert (top / "0").samefile(top / "69999")


def test_kernel_reads_120_layers(tmp_path: Path) -> None:
    layers = [random.Random(number).randbytes(1024) for number in range(120)]
    root = directory(
        {b"%d" % number: regular(1000, Extent(0, number, 0, 1000)) for number in range(120)}
    )
    with on_kernel(root, layers, tmp_path) as top:
        assert_same(top, root, layers)


def test_kernel_reads_a_tree_without_layers(tmp_path: Path) -> None:
    root = directory()
    with on_kernel(root, [], tmp_path) as top:
        assert_same(top, root, [])
