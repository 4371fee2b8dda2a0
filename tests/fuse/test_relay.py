"""The relay between a kernel and a library that are played by the tests, message by message."""

from __future__ import annotations

import errno
import gc
import os
import socket
import struct
import termios
import weakref
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
import trio
import trio.testing

from index.errors import FirstByteError
from snapshotter.fuse import device, waiters
from snapshotter.fuse.answers import Answers
from snapshotter.fuse.failures import FailureLog
from snapshotter.fuse.handshake import InitFlag, InitRequest
from snapshotter.fuse.relay import Relay
from snapshotter.fuse.view import View, Views, pack_inode
from snapshotter.fuse.wire import IN_HEADER, ROOT, Opcode
from tests.support.serving import MemoryLayer, directory, packed, view_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

OFFERED = InitFlag.NO_OPEN_SUPPORT | InitFlag.NO_OPENDIR_SUPPORT
READ_IN = struct.Struct("=QQIIQII")
OUT_HEADER = struct.Struct("=IiQ")
NOBODY = 0  # a thread that is not known
DEADLINE = 20


def read_in(offset: int, size: int, handle: int = 0) -> bytes:
    return READ_IN.pack(handle, offset, size, 0, 0, 0, 0)


class SlowLayer(MemoryLayer):
    """Data that is fetched when `arrived` is set."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data, local=False)
        self.arrived = trio.Event()
        self.asked = trio.Event()
        self.given_up = 0

    async def read(self, offset: int, length: int) -> bytes:
        self.asked.set()
        try:
            await self.arrived.wait()
        except trio.Cancelled:
            self.given_up += 1
            raise
        return await super().read(offset, length)


class Played:
    """The kernel's end and the library's, as trio sockets, and what lies between them."""

    def __init__(self, kernel: socket.socket, library: socket.socket, views: Views) -> None:
        self.kernel = trio.socket.from_stdlib_socket(kernel)
        self.library = trio.socket.from_stdlib_socket(library)
        self.raw = kernel
        self.views = views
        self.ended = trio.Event()
        self._unique = 0

    async def ask(self, opcode: int, nodeid: int, body: bytes = b"", thread: int = NOBODY) -> int:
        """Send a request; its number."""
        self._unique += 2
        size = IN_HEADER.size + len(body)
        header = IN_HEADER.pack(size, opcode, self._unique, nodeid, 0, 0, thread, 0, 0)
        await self.kernel.send(header + body)
        return self._unique

    async def interrupt(self, unique: int) -> None:
        await self.ask(Opcode.INTERRUPT, 0, struct.pack("=Q", unique))

    async def reply(self) -> tuple[int, int, bytes]:
        """(unique, errno, data) of the next answer."""
        message = await self.kernel.recv(2 << 20)
        size, error, unique = OUT_HEADER.unpack_from(message)
        assert size == len(message)
        return unique, -error, message[OUT_HEADER.size :]


@asynccontextmanager
async def relaying(*views: View, offered: InitFlag = OFFERED) -> AsyncIterator[Played]:
    registry = Views()
    for view in views:
        registry.add(view)
    kind = socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK
    kernel, fuse = socket.socketpair(socket.AF_UNIX, kind)
    ours, library = socket.socketpair(socket.AF_UNIX, kind)
    request = InitRequest(unique=1, minor=45, max_readahead=0, flags=offered, later=b"")
    failures = FailureLog(registry)
    relay = Relay(fuse.fileno(), ours, Answers(registry, failures, request), registry, failures)
    with kernel, fuse, ours, library, trio.fail_after(DEADLINE):
        async with trio.open_nursery() as nursery:
            played = Played(kernel, library, registry)

            async def run() -> None:
                await relay.run()
                played.ended.set()

            nursery.start_soon(run)
            yield played
            nursery.cancel_scope.cancel()


@pytest.fixture
def view() -> View:
    files, raw = packed({b"f": b"content"})
    return view_of(directory({**files, b"d": directory({})}), [MemoryLayer(raw)])


def number_of(view: View, name: bytes = b"f") -> int:
    nid = view.image.lookup(view.image.root, name)
    assert nid is not None
    return pack_inode(view.slot, nid)


async def test_data_at_hand_is_the_answer(view: View) -> None:
    async with relaying(view) as played:
        for offset, size, data in ((0, 4096, b"content"), (3, 2, b"te"), (7, 100, b"")):
            unique = await played.ask(Opcode.READ, number_of(view), read_in(offset, size))
            assert await played.reply() == (unique, 0, data)


async def test_an_image_that_has_gone_is_not_held_until_another_one_is_read() -> None:
    files, raw = packed({b"f": b"content"})
    image = view_of(directory(files), [MemoryLayer(raw)])
    gone = weakref.ref(image)
    async with relaying() as played:
        played.views.add(image)
        await played.ask(Opcode.READ, number_of(image), read_in(0, 4096))
        await played.reply()
        played.views.remove(image)
        del image
        gc.collect()
        assert gone() is None


@pytest.mark.parametrize("handle", [0, 1, 2**64 - 1])
async def test_a_handle_from_before_means_nothing(view: View, handle: int) -> None:
    """A predecessor gave out handles, or none; the kernel goes on with them."""
    async with relaying(view) as played:
        unique = await played.ask(Opcode.READ, number_of(view), read_in(0, 4096, handle))
        assert await played.reply() == (unique, 0, b"content")
        unique = await played.ask(
            Opcode.RELEASE, number_of(view), struct.pack("=QIIQ", handle, 0, 0, 0)
        )
        assert await played.reply() == (unique, 0, b"")


@pytest.mark.parametrize("opcode", [Opcode.OPEN, Opcode.OPENDIR])
async def test_the_kernel_is_told_not_to_ask_before_it_opens(view: View, opcode: Opcode) -> None:
    body = struct.pack("=II", os.O_RDONLY | os.O_NOFOLLOW, 0)
    async with relaying(view) as played:
        unique = await played.ask(opcode, number_of(view), body)
        assert await played.reply() == (unique, errno.ENOSYS, b"")


async def test_whether_a_file_is_a_terminal_is_answered_at_once(view: View) -> None:
    """Python asks that of each module that it opens."""
    body = struct.pack("=QIIQII", 0, 0, termios.TCGETS, 0, 0, 0)
    async with relaying(view) as played:
        unique = await played.ask(Opcode.IOCTL, number_of(view), body)
        assert await played.reply() == (unique, errno.ENOTTY, b"")


@pytest.mark.parametrize(("opcode", "flags"), [(Opcode.OPEN, 2), (Opcode.OPENDIR, 2 | 8)])
async def test_a_kernel_that_must_ask_gets_a_handle(view: View, opcode: Opcode, flags: int) -> None:
    number = number_of(view)
    async with relaying(view, offered=InitFlag(0)) as played:
        unique = await played.ask(opcode, number, bytes(8))
        assert await played.reply() == (unique, 0, struct.pack("=QII", number, flags, 0))


@pytest.mark.parametrize("flags", [os.O_WRONLY, os.O_RDWR, os.O_RDONLY | os.O_TRUNC])
async def test_nothing_is_opened_for_writing(view: View, flags: int) -> None:
    async with relaying(view) as played:
        unique = await played.ask(Opcode.OPEN, number_of(view), struct.pack("=II", flags, 0))
        assert await played.reply() == (unique, errno.EROFS, b"")


async def test_what_is_not_known_here_goes_to_the_library_and_its_answer_back(view: View) -> None:
    async with relaying(view) as played:
        for opcode, nodeid, body in (
            (Opcode.LOOKUP, pack_inode(77, 5), b"name\0"),  # a slot that no view has
            (5, number_of(view), b""),  # READLINK
            (9999, number_of(view), b"?" * 5000),
        ):
            unique = await played.ask(opcode, nodeid, body)
            message = await played.library.recv(1 << 20)
            assert IN_HEADER.unpack_from(message)[:4] == (len(message), opcode, unique, nodeid)
            assert message[IN_HEADER.size :] == body
            await played.library.send(OUT_HEADER.pack(20, 0, unique) + b"told")
            assert await played.reply() == (unique, 0, b"told")


async def test_the_library_finds_the_inode_in_the_handle(view: View) -> None:
    async with relaying(view) as played:
        for opcode, nodeid in ((Opcode.READDIRPLUS, ROOT), (Opcode.READ, pack_inode(77, 5))):
            await played.ask(opcode, nodeid, read_in(3, 4096))
            message = await played.library.recv(1 << 20)
            assert READ_IN.unpack_from(message, IN_HEADER.size)[:3] == (nodeid, 3, 4096)


async def test_many_requests_wait_for_a_library_that_is_busy(view: View) -> None:
    """More than its socket holds; lookups go on when it reads again."""
    async with relaying(view) as played, trio.open_nursery() as nursery:
        count = 1000

        async def ask() -> None:
            for _ in range(count):
                await played.ask(5, number_of(view), bytes(1000))
            await played.ask(Opcode.GETATTR, number_of(view), bytes(16))

        nursery.start_soon(ask)
        await trio.testing.wait_all_tasks_blocked(0.01)
        seen = []
        for _ in range(count):
            message = await played.library.recv(1 << 20)
            seen.append(IN_HEADER.unpack_from(message)[2])
        assert seen == list(range(2, 2 * count + 1, 2))
        unique, error, _ = await played.reply()
        assert (unique, error) == (2 * count + 2, 0)


async def test_a_notification_waits_for_nothing_here(view: View) -> None:
    async with relaying(view) as played:
        await played.library.send(OUT_HEADER.pack(16, 3, 0))
        assert await played.reply() == (0, -3, b"")


async def test_a_read_waits_and_others_do_not(view: View) -> None:
    files, raw = packed({b"f": b"slow"})
    layer = SlowLayer(raw)
    slow = view_of(directory(files), [layer], slot=2, name=b"slow")
    async with relaying(view, slow) as played:
        first = await played.ask(Opcode.READ, number_of(slow), read_in(0, 4096))
        second = await played.ask(Opcode.READ, number_of(view), read_in(0, 4096))
        assert await played.reply() == (second, 0, b"content")
        layer.arrived.set()
        assert await played.reply() == (first, 0, b"slow")


async def test_a_read_that_fails_is_an_error(view: View) -> None:
    files, raw = packed({b"f": b"slow"})
    away = view_of(directory(files), [MemoryLayer(raw, local=False, failing=True)], slot=2)
    away.name = b"away"
    async with relaying(view, away) as played:
        unique = await played.ask(Opcode.READ, number_of(away), read_in(0, 4096))
        assert await played.reply() == (unique, errno.EIO, b"")
        view.refusal = FirstByteError("the index lies")
        unique = await played.ask(Opcode.READ, number_of(view), read_in(0, 4096))
        assert await played.reply() == (unique, errno.EIO, b"")


async def test_no_more_is_taken_while_too_many_wait(
    view: View, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waiters, "_MAX_WAITING", 2)
    files, raw = packed({b"f": b"slow"})
    layer = SlowLayer(raw)
    slow = view_of(directory(files), [layer], slot=2, name=b"slow")
    async with relaying(view, slow) as played:
        asked = [await played.ask(Opcode.READ, number_of(slow), read_in(0, 9)) for _ in range(5)]
        with trio.move_on_after(0.05):
            last = await played.ask(Opcode.READ, number_of(view), read_in(0, 9))
            raise AssertionError(await played.reply())
        layer.arrived.set()
        replies = [await played.reply() for _ in range(6)]
        assert sorted(replies) == [
            *((unique, 0, b"slow") for unique in asked),
            (last, 0, b"content"),
        ]


async def test_a_flood_of_requests_leaves_time_for_others(
    view: View, monkeypatch: pytest.MonkeyPatch
) -> None:
    answered = 0
    most = 0
    answer = Answers.answer

    def count(self: Answers, *request: Any) -> bytes | None:
        nonlocal answered
        answered += 1
        return answer(self, *request)

    async def watch() -> None:
        nonlocal most
        while True:
            before = answered
            await trio.lowlevel.checkpoint()
            most = max(most, answered - before)

    monkeypatch.setattr(Answers, "answer", count)
    async with relaying(view) as played, trio.open_nursery() as nursery:
        nursery.start_soon(watch)
        message = IN_HEADER.pack(IN_HEADER.size + 16, Opcode.GETATTR, 4, ROOT, 0, 0, 0, 0, 0)
        for _ in range(150):  # all are there before the first is read
            played.raw.send(message + bytes(16))
        for _ in range(150):
            await played.reply()
        nursery.cancel_scope.cancel()
    assert 1 < most <= 2 * 8  # one turn of ours may see two of the relay's


async def interrupted(view: View, layer: SlowLayer, *, thread: int) -> tuple[int, int, bytes]:
    """The answer to a read whose reader was sent a signal, if its data came only then."""
    async with relaying(view) as played:
        unique = await played.ask(Opcode.READ, number_of(view), read_in(0, 4096), thread)
        await layer.asked.wait()
        for _ in range(3):
            await played.interrupt(unique)
        await trio.testing.wait_all_tasks_blocked()
        if not layer.given_up:
            layer.arrived.set()
        answer = await played.reply()
        assert answer[0] == unique
        last = await played.ask(Opcode.RELEASE, number_of(view), bytes(24))
        assert await played.reply() == (last, 0, b"")  # and that was the only one
        return answer


@pytest.fixture
def slow() -> tuple[View, SlowLayer]:
    files, raw = packed({b"f": b"slow"})
    layer = SlowLayer(raw)
    return view_of(directory(files), [layer]), layer


@pytest.mark.parametrize("thread", [NOBODY, 1], ids=["unknown", "alive"])
async def test_a_signal_does_not_interrupt_a_read(
    slow: tuple[View, SlowLayer], thread: int
) -> None:
    """Files on disks are not interrupted either, and programs rely on it."""
    _, error, data = await interrupted(*slow, thread=thread)
    assert (error, data) == (0, b"slow")
    assert slow[1].given_up == 0


async def test_a_reader_that_is_being_killed_is_let_go(
    slow: tuple[View, SlowLayer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waiters, "_is_being_killed", lambda thread: thread == 7)
    _, error, data = await interrupted(*slow, thread=7)
    assert (error, data) == (errno.EINTR, b"")
    assert slow[1].given_up == 1


async def test_who_waits_for_the_library_and_is_being_killed_is_let_go(
    view: View, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waiters, "_is_being_killed", lambda thread: thread == 7)
    async with relaying(view) as played:
        other = await played.ask(5, number_of(view), thread=8)
        killed = await played.ask(5, number_of(view), thread=7)
        await played.interrupt(other)
        await played.interrupt(killed)
        assert await played.reply() == (killed, errno.EINTR, b"")
        await played.library.send(OUT_HEADER.pack(16, 0, other))
        assert await played.reply() == (other, 0, b"")


async def test_an_interrupt_that_comes_too_late_or_too_early_harms_nobody(view: View) -> None:
    """The kernel does not know such a number, and forgets the answer."""
    async with relaying(view) as played:
        unique = await played.ask(Opcode.READ, number_of(view), read_in(0, 4096))
        assert await played.reply() == (unique, 0, b"content")
        for late_or_early in (unique, unique + 100):
            await played.interrupt(late_or_early)
            assert await played.reply() == (late_or_early, errno.EINTR, b"")
        unique = await played.ask(Opcode.READ, number_of(view), read_in(0, 4096))
        assert await played.reply() == (unique, 0, b"content")


@pytest.mark.parametrize(
    ("error", "gone"),
    [(errno.ENOENT, False), (errno.EINTR, False), (errno.ENODEV, True), (errno.ECONNABORTED, True)],
)
async def test_what_the_device_says_instead_of_a_request(
    view: View, error: int, gone: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = [OSError(error, os.strerror(error))] * 3

    def readv(*arguments: Any) -> int:
        if failures:
            raise failures.pop()
        return os_readv(*arguments)

    os_readv = os.readv
    monkeypatch.setattr(device.os, "readv", readv)
    async with relaying(view) as played:
        # A device whose mount is gone can be read, too (fuse_dev_poll: EPOLLERR).
        unique = await played.ask(Opcode.READ, number_of(view), read_in(0, 4096))
        if gone:
            await played.ended.wait()
        else:
            assert await played.reply() == (unique, 0, b"content")
