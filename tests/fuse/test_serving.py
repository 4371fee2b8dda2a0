"""What happens when fetching fails, when images come and go, when many read at once."""

from __future__ import annotations

import errno
import logging
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
import trio

from index.tree import Node
from snapshotter.fuse import waiters, wire
from snapshotter.fuse.answers import Answers
from snapshotter.fuse.wire import Opcode, OpenFlag
from tests.support.serving import MemoryLayer, Served, directory, packed, regular, served, view_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.root


@pytest.fixture
def fs(tmp_path: Path) -> Path:
    path = tmp_path / "fs"
    path.mkdir()
    return path


def test_many_readers_at_once(fs: Path) -> None:
    contents = {b"%d" % number: os.urandom(100_000 + number) for number in range(20)}
    files, raw = packed(contents)
    layer = MemoryLayer(raw, local=False)
    with served(fs, view_of(directory(files), [layer])), ThreadPoolExecutor(16) as readers:
        names = sorted(contents) * 8
        found = readers.map(lambda name: (fs / "image" / name.decode()).read_bytes(), names)
        assert list(found) == [contents[name] for name in names]


def test_a_failed_read_is_an_error_once_and_no_memory_of_it_stays(
    fs: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither the server nor the kernel's page cache may remember a failure as an answer."""
    files, raw = packed({b"f": b"content" * 1000})
    layer = MemoryLayer(raw, local=False, failing=True)
    with served(fs, view_of(directory(files), [layer])):
        with (fs / "image" / "f").open("rb") as file:
            with pytest.raises(OSError, match=os.strerror(errno.EIO)):
                file.read()
            layer.failing = False
            file.seek(0)
            assert file.read() == b"content" * 1000
        assert (fs / "image" / "f").read_bytes() == b"content" * 1000
    complaints = [
        record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR
    ]
    assert complaints
    assert all(
        "example/image" in line and "at 0" in line and "the registry is away" in line
        for line in complaints
    )


def test_a_flood_of_failures_is_a_few_log_lines(fs: Path, caplog: pytest.LogCaptureFixture) -> None:
    files, raw = packed({b"%d" % number: b"x" for number in range(300)})
    layer = MemoryLayer(raw, local=False, failing=True)
    with served(fs, view_of(directory(files), [layer])):
        for name in files:
            with pytest.raises(OSError, match=os.strerror(errno.EIO)):
                (fs / "image" / name.decode()).read_bytes()
    assert 1 <= len([record for record in caplog.records if record.levelno >= logging.ERROR]) < 60


def test_a_damaged_inode_is_an_input_output_error_and_nothing_else_fails(fs: Path) -> None:
    view = view_of(directory({b"good": regular(0), b"bad": regular(0)}), [])
    nid = view.image.lookup(view.image.root, b"bad")
    assert nid is not None
    damaged = bytearray(view.image.buffer)
    start = view.image.meta_start + 32 * nid
    damaged[start : start + 2] = b"\xff\xff"
    view.image.buffer = bytes(damaged)
    with served(fs, view):
        with pytest.raises(OSError, match=os.strerror(errno.EIO)):
            os.stat(fs / "image" / "bad")
        assert os.stat(fs / "image" / "good").st_size == 0


def listed(mounted: Served) -> list[str]:
    return sorted(os.listdir(mounted.mountpoint))


def test_the_list_of_views_is_never_an_old_one(fs: Path) -> None:
    """The kernel keeps listings; this one is good for as long as its directory's time."""
    with served(fs) as mounted:
        for number in range(20):
            name = b"%d" % number
            view = view_of(directory({b"f": regular(0)}), [], slot=number + 1, name=name)
            mounted.views.add(view)
            for _ in range(2):
                assert listed(mounted) == [name.decode()]
                assert [entry.is_dir() for entry in os.scandir(fs)] == [True]
            mounted.views.remove(view)
            assert listed(mounted) == []
            assert not (fs / name.decode()).exists()


def test_a_successor_shows_its_own_list_of_views(fs: Path) -> None:
    with served(fs, view_of(directory({}), [], name=b"first")) as mounted:
        assert listed(mounted) == ["first"]
        mounted.views.add(view_of(directory({}), [], slot=2, name=b"second"))
        mounted.succeed()
        assert listed(mounted) == ["first", "second"]


def test_views_come_and_go(fs: Path) -> None:
    first = view_of(directory({b"f": regular(0)}), [], slot=1, name=b"first")
    second = view_of(directory({b"g": regular(0)}), [], slot=2, name=b"second")
    with served(fs, first) as mounted:
        assert listed(mounted) == ["first"]
        assert not (fs / "second").exists()
        mounted.views.add(second)
        assert listed(mounted) == ["first", "second"]
        assert os.listdir(fs / "second") == ["g"]
        held = os.open(fs / "first", os.O_RDONLY)
        try:
            mounted.views.remove(first)
            mounted.forget(b"first")
            assert listed(mounted) == ["second"]
            assert not (fs / "first").exists()
            with pytest.raises(OSError, match=os.strerror(errno.ESTALE)):
                os.stat("unknown", dir_fd=held)
        finally:
            os.close(held)


def test_a_name_that_is_used_again_shows_the_new_image(fs: Path) -> None:
    old_files, old_raw = packed({b"f": b"old"})
    new_files, new_raw = packed({b"f": b"new"})
    old = view_of(directory(old_files), [MemoryLayer(old_raw)], slot=1, name=b"image")
    new = view_of(directory(new_files), [MemoryLayer(new_raw)], slot=2, name=b"image")
    with served(fs, old) as mounted:
        assert (fs / "image" / "f").read_bytes() == b"old"
        mounted.views.remove(old)
        mounted.forget(b"image")
        mounted.views.add(new)
        assert (fs / "image" / "f").read_bytes() == b"new"


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often the kernel asks for what."""
    counts: Counter[str] = Counter()
    parse = wire.REQUEST.unpack_from

    def count(buffer: bytearray) -> tuple[int, int, int]:
        opcode, unique, nodeid = parse(buffer)
        counts[Opcode(opcode).name if opcode in list(Opcode) else str(opcode)] += 1
        return opcode, unique, nodeid

    monkeypatch.setattr(wire, "REQUEST", SimpleNamespace(unpack_from=count))
    return counts


def test_what_the_kernel_knows_costs_no_request(fs: Path, requests: Counter[str]) -> None:
    """Opening, closing, listing, reading, following links and asking for attributes."""
    files, raw = packed({b"%d" % number: b"content" * number for number in range(50)})
    files[b"link"] = Node(stat.S_IFLNK | 0o777, target=b"7", size=1)
    with served(fs, view_of(directory(files), [MemoryLayer(raw)])):
        image = os.open(fs / "image", os.O_PATH)

        def use() -> None:
            folder = os.open(".", os.O_RDONLY, dir_fd=image)
            assert len(os.listdir(folder)) == 51
            os.close(folder)
            for name in [str(number) for number in range(50)] + ["link"]:
                file = os.open(name, os.O_RDONLY, dir_fd=image)
                os.fstat(file)
                os.read(file, 4096)
                os.close(file)
                with suppress(OSError):
                    os.getxattr(f"/proc/self/fd/{image}/{name}", b"system.posix_acl_access")
            with suppress(FileNotFoundError):
                os.stat("missing", dir_fd=image)

        try:
            use()
            assert requests["OPEN"] == requests["OPENDIR"] == 1  # and never again
            assert requests["READDIRPLUS"] >= 1
            assert requests["RELEASE"] == requests["RELEASEDIR"] == 0
            requests.clear()
            use()
            assert not requests
        finally:
            os.close(image)


def test_files_stay_open_while_one_process_succeeds_another(
    fs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first one, as versions before this one, gives out handles. The next one does not."""
    files, raw = packed({b"f": b"content", b"g": b"other"})
    with monkeypatch.context() as before:
        before.setattr(Answers, "_open", answer_with_a_handle)
        before.setattr(Answers, "_opendir", answer_with_a_handle)
        with served(fs, view_of(directory(files), [MemoryLayer(raw)])) as mounted:
            file = os.open(fs / "image" / "f", os.O_RDONLY)
            folder = os.open(fs / "image", os.O_RDONLY)
            before.undo()
            mounted.succeed()
            assert os.read(file, 100) == b"content"
            assert sorted(os.listdir(folder)) == ["f", "g"]
            os.close(file)
            os.close(folder)
            assert (fs / "image" / "g").read_bytes() == b"other"
            mounted.succeed()
            assert sorted(os.listdir(fs / "image")) == ["f", "g"]
            assert (fs / "image" / "f").read_bytes() == b"content"


def answer_with_a_handle(self: Answers, unique: int, nodeid: int, body: memoryview) -> bytes:
    return wire.open_reply(unique, nodeid, OpenFlag.KEEP_CACHE)


READ_DIRECTLY = """
import mmap, os, signal, sys
signal.signal(signal.SIGUSR1, lambda *_: None)
signal.siginterrupt(signal.SIGUSR1, True)
file = os.open(sys.argv[1], os.O_RDONLY | os.O_DIRECT)
buffer = mmap.mmap(-1, 4096)
print("reading", flush=True)
print(os.preadv(file, [buffer], 0), flush=True)
"""


@contextmanager
def direct_reader(path: Path) -> Iterator[subprocess.Popen[str]]:
    """A program that reads past the page cache, so that nobody else waits for the data."""
    command = [sys.executable, "-c", READ_DIRECTLY, path]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "reading\n"
            yield process
        finally:
            process.kill()


class HeldLayer(MemoryLayer):
    """A layer whose data does not arrive before it is let go."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data, local=False)
        self.let_go = threading.Event()
        self.asked = threading.Event()

    async def read(self, offset: int, length: int) -> bytes:
        self.asked.set()
        await trio.to_thread.run_sync(self.let_go.wait, abandon_on_cancel=True)
        return await super().read(offset, length)


@pytest.mark.parametrize("fatal", [signal.SIGKILL, signal.SIGTERM, signal.SIGQUIT])
def test_a_reader_that_is_killed_need_not_wait_for_its_data(
    fs: Path, fatal: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waiters, "_LOOK_SECONDS", 0.01)
    files, raw = packed({b"f": b"content" * 1000})
    layer = HeldLayer(raw)
    with (
        served(fs, view_of(directory(files), [layer])),
        direct_reader(fs / "image" / "f") as reader,
    ):
        try:
            assert layer.asked.wait(20)
            reader.send_signal(signal.SIGUSR1)  # one that it survives, and goes on waiting
            time.sleep(0.05)
            assert reader.poll() is None
            reader.send_signal(fatal)
            assert reader.wait(20) == -fatal
        finally:
            layer.let_go.set()
        assert (fs / "image" / "f").read_bytes() == b"content" * 1000


def test_a_reader_that_is_sent_a_signal_gets_its_data(fs: Path) -> None:
    files, raw = packed({b"f": b"content" * 1000})
    layer = HeldLayer(raw)
    with (
        served(fs, view_of(directory(files), [layer])),
        direct_reader(fs / "image" / "f") as reader,
    ):
        try:
            assert layer.asked.wait(20)
            reader.send_signal(signal.SIGUSR1)
            time.sleep(0.05)
        finally:
            layer.let_go.set()
        assert reader.stdout is not None
        assert reader.stdout.read() == "4096\n"
