"""The FUSE session itself: mounted, tuned, gone."""

from __future__ import annotations

import errno
import os
import re
import stat
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pyfuse3
import pytest
import trio

from index.errors import FirstByteError
from snapshotter.fuse import device, handshake, session
from snapshotter.fuse.device import FILE_SYSTEM
from snapshotter.fuse.handshake import HandshakeError
from snapshotter.mounts import syscalls
from snapshotter.mounts.errors import MountError
from snapshotter.mounts.idmap import IdMapping, can_idmap, user_namespace
from snapshotter.mounts.syscalls import MountFlag
from snapshotter.mounts.table import mount_at
from tests.support.serving import MemoryLayer, directory, packed, served, view_of

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterator

    from snapshotter.fuse.handshake import InitReply, InitRequest
    from snapshotter.fuse.view import View

pytestmark = pytest.mark.root


@pytest.fixture
def fs(tmp_path: Path) -> Path:
    path = tmp_path / "fs"
    path.mkdir()
    return path


class WatchedLayer(MemoryLayer):
    """A layer that is here and knows in which pieces it was read."""

    def read_now(self, offset: int, length: int) -> bytes | None:
        self.fetches.append((offset, length))
        return super().read_now(offset, length)


def open_files() -> list[str]:
    """What every descriptor of this process leads to, of which two may lead to the same."""
    folder = "/proc/self/fd"
    return sorted(
        os.readlink(f"{folder}/{name}")
        for name in os.listdir(folder)
        if os.path.lexists(f"{folder}/{name}")
    )


@contextmanager
def idmapped(source: Path, target: Path) -> Iterator[None]:
    """A copy of the mount at `source`, as containerd makes one: a container's 0 is 100000."""
    target.mkdir()
    shift = [(0, 100_000, 65536)]
    with user_namespace(IdMapping(shift, shift)) as namespace:
        tree = syscalls.clone_tree(source)
        try:
            syscalls.set_idmap(tree, namespace, source)
            syscalls.attach(tree, target)
        finally:
            os.close(tree)
    try:
        yield
    finally:
        syscalls.unmount(target)


def owner(path: Path) -> tuple[int, int]:
    status = path.lstat()
    return status.st_uid, status.st_gid


def test_the_mount_is_ours_read_only_and_private_and_allows_programs_and_devices(fs: Path) -> None:
    with served(fs):
        entry = mount_at(fs)
        assert entry is not None
        assert entry.kind == FILE_SYSTEM.encode()
        assert entry.source == os.fsencode(fs)
        assert b"ro" in entry.options
        assert not {b"nosuid", b"nodev", b"noexec"} & set(entry.options)
        assert entry.optional == ()


def test_read_ahead_is_a_chunk(fs: Path) -> None:
    with served(fs):
        entry = mount_at(fs)
        assert entry is not None
        device = "{}:{}".format(*entry.device)
        assert Path(f"/sys/class/bdi/{device}/read_ahead_kb").read_text().strip() == "256"


def test_the_kernel_may_have_more_read_ahead_in_flight(fs: Path, tmp_path: Path) -> None:
    control = tmp_path / "control"
    control.mkdir()
    with served(fs):
        entry = mount_at(fs)
        assert entry is not None
        syscalls.mount("fusectl", control, "fusectl", MountFlag(0))
        try:
            limit = (control / str(entry.device[1]) / "max_background").read_text()
        finally:
            syscalls.unmount(control)
        assert limit.strip() == "256"


def test_a_read_in_order_arrives_in_requests_of_a_chunk(fs: Path) -> None:
    """And not in pages."""
    files, raw = packed({b"f": bytes(8 << 20)})
    layer = WatchedLayer(raw)
    with served(fs, view_of(directory(files), [layer])):
        assert (fs / "image" / "f").read_bytes() == raw
    assert max(length for _, length in layer.fetches) == 256 << 10


def test_nothing_is_left_after_a_session(fs: Path) -> None:
    """No mount, no open descriptor, no thread but trio's cached workers; and again, and again."""
    before = open_files()
    for _ in range(3):
        with served(fs, view_of(directory({}), [])):
            assert os.listdir(fs) == ["image"]
        assert mount_at(fs) is None
        assert os.listdir(fs) == []
        assert open_files() == before
    assert not [thread for thread in threading.enumerate() if "pyfuse" in thread.name]


def test_a_mount_is_gone_and_nothing_open_when_the_library_cannot_start(
    fs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = open_files()

    def fail(*_: object) -> None:
        raise RuntimeError("no session")

    monkeypatch.setattr(pyfuse3, "init", fail)
    with pytest.raises(RuntimeError, match="no session"), served(fs):
        pass
    assert mount_at(fs) is None
    assert open_files() == before


def test_a_library_that_does_not_answer_ends_the_session(
    fs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = open_files()
    monkeypatch.setattr(session, "_READY_SECONDS", 0.1)
    monkeypatch.setattr(session, "_answer_rest", trio.sleep_forever)
    with pytest.raises(MountError, match="the FUSE library does not answer"), served(fs):
        pass
    assert mount_at(fs) is None
    assert open_files() == before


def test_a_library_that_refuses_the_kernel_ends_the_session(
    fs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A protocol of another major number, which libfuse answers with an error."""
    before = open_files()
    monkeypatch.setattr(handshake, "_MAJOR", 6)
    monkeypatch.setattr(handshake, "_check_major", lambda who, major: None)
    with pytest.raises(HandshakeError, match="the FUSE library refuses"), served(fs):
        pass
    assert mount_at(fs) is None
    assert open_files() == before


def test_a_mount_that_goes_during_the_handshake_ends_the_session(
    fs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = open_files()

    def unmount(reply: InitReply, request: InitRequest) -> InitReply:
        syscalls.unmount(fs, detach=True)
        return reply

    monkeypatch.setattr(handshake, "allow_idmap", unmount)
    with pytest.raises(MountError, match="the kernel takes no answer to FUSE_INIT"), served(fs):
        pass
    assert open_files() == before


def test_a_request_that_the_kernel_takes_back_harms_nobody(
    fs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device is readable, and then it is not: every other wait ends with nothing to read."""
    wait_readable = trio.lowlevel.wait_readable
    waits = 0

    async def fooled(descriptor: int | socket.socket) -> None:
        nonlocal waits
        number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
        if stat.S_ISSOCK(os.fstat(number).st_mode):  # the library's: nothing is taken back there
            await wait_readable(descriptor)
            return
        waits += 1
        if waits % 2:
            await trio.lowlevel.checkpoint()
        else:
            await wait_readable(descriptor)

    monkeypatch.setattr(trio.lowlevel, "wait_readable", fooled)
    files, raw = packed({b"%d" % number: b"content" * number for number in range(100)})
    layer = MemoryLayer(raw, local=False)
    while waits <= 100:  # a busy machine has the next request before it could be waited for
        with served(fs, view_of(directory(files), [layer])), ThreadPoolExecutor(8) as readers:
            paths = [fs / "image" / str(number) for number in range(100)]
            assert list(readers.map(Path.read_bytes, paths)) == [b"content" * n for n in range(100)]


@pytest.fixture
def owned() -> View:
    """A program of root's, and a file that only user 7 may read."""
    files, raw = packed({b"program": b"#!", b"f": b"content"})
    files[b"program"].mode |= 0o4111
    files[b"f"].mode = stat.S_IFREG | 0o600
    files[b"f"].uid, files[b"f"].gid = 7, 8
    folder = directory({b"empty": directory({})})
    return view_of(directory({**files, b"d": folder}), [MemoryLayer(raw)])


def test_an_idmapped_copy_shows_owners_shifted(fs: Path, tmp_path: Path, owned: View) -> None:
    copy = tmp_path / "copy"
    with served(fs, owned), idmapped(fs / "image", copy):
        assert owner(copy / "program") == (100_000, 100_000)
        assert owner(copy / "f") == (100_007, 100_008)
        assert owner(copy / "d" / "empty") == (100_000, 100_000)
        assert owner(fs / "image" / "f") == (7, 8)
        assert (copy / "f").read_bytes() == b"content"
        assert sorted(os.listdir(copy)) == ["d", "f", "program"]


def test_permissions_are_those_of_the_shifted_owners(fs: Path, tmp_path: Path, owned: View) -> None:
    copy = tmp_path / "copy"

    def cat(folder: Path, user: int) -> subprocess.CompletedProcess[str]:
        command = ["cat", "f"]
        return subprocess.run(
            command, cwd=folder, user=user, text=True, capture_output=True, check=False, timeout=60
        )

    with served(fs, owned), idmapped(fs / "image", copy):
        assert cat(copy, 100_007).stdout == "content"
        assert "Permission denied" in cat(copy, 7).stderr
        assert "Permission denied" in cat(copy, 100_008).stderr
        assert cat(fs / "image", 7).stdout == "content"
        assert "Permission denied" in cat(fs / "image", 100_007).stderr


def test_a_container_writes_over_an_idmapped_copy(fs: Path, tmp_path: Path, owned: View) -> None:
    """overlayfs as containerd mounts it: what is copied up belongs to the container's users."""
    copy, upper, work, root = (tmp_path / name for name in ("copy", "upper", "work", "root"))
    for path in (upper, work, root):
        path.mkdir()
    with served(fs, owned), idmapped(fs / "image", copy):
        options = f"lowerdir={copy},upperdir={upper},workdir={work}"
        syscalls.mount("overlay", root, "overlay", MountFlag(0), options)
        try:
            with (root / "f").open("ab") as file:
                file.write(b" and more")
            (root / "d" / "empty" / "new").touch()
            assert (root / "f").read_bytes() == b"content and more"
            assert owner(root / "program") == (100_000, 100_000)
            assert owner(upper / "f") == (100_007, 100_008)
            assert owner(upper / "d") == owner(upper / "d" / "empty") == (100_000, 100_000)
        finally:
            syscalls.unmount(root)


def test_a_mount_says_that_it_can_be_idmapped(fs: Path, owned: View) -> None:
    with served(fs, owned):
        assert can_idmap(fs)
        assert can_idmap(fs / "image" / "d")


def test_a_kernel_that_offers_no_idmapped_mounts_is_the_reason(
    fs: Path, owned: View, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer stays as libfuse has made it, as it does with a kernel before 6.12."""
    monkeypatch.setattr(handshake, "allow_idmap", lambda reply, request: reply)
    with served(fs, owned):
        support = can_idmap(fs / "image")
        assert (fs / "image" / "f").read_bytes() == b"content"
    assert not support
    assert re.search(r"does not idmap this fuse\.firstbyte .*since 6\.12", support.reason)


def test_a_session_ends_with_files_still_open(fs: Path) -> None:
    files, raw = packed({b"f": b"content"})
    with served(fs, view_of(directory(files), [MemoryLayer(raw)])):
        file = os.open(fs / "image" / "f", os.O_RDONLY)
    with pytest.raises(OSError, match=os.strerror(errno.ENOTCONN)):
        os.read(file, 1)
    with suppress(OSError):  # closing asks the server too, which is gone
        os.close(file)
    assert mount_at(fs) is None


def test_a_session_that_is_unmounted_from_outside_ends(fs: Path) -> None:
    with served(fs) as mounted:
        assert mounted is not None
        syscalls.unmount(fs)
    assert mount_at(fs) is None


def test_a_mount_point_that_does_not_exist_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(FirstByteError, match="make the directory first"), served(tmp_path / "none"):
        pass


def test_without_the_device_the_error_says_what_to_load(
    fs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "_PATH", "/dev/no-such-device")
    with pytest.raises(MountError, match="modprobe fuse"), served(fs):
        pass
    assert mount_at(fs) is None
