"""A real gRPC client on a real socket; behind the server, a service that the test speaks for."""

from __future__ import annotations

import errno
import logging
import os
import stat
import threading
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, TypeVar

import grpc
import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from index.errors import FirstByteError, IntegrityError
from snapshotter.containerd import errors, server
from snapshotter.containerd.counters import CallCount, CallCounters
from snapshotter.containerd.messages import METHODS, SERVICE
from snapshotter.containerd.snapshots import Info, Kind, Mount, Usage
from tests.support.grpc_clients import SnapshotsClient, open_channel, unary
from tests.support.nobody import as_nobody

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence

_SOON = 30.0  # seconds; for what happens at once unless the machine is busy
_CODE = grpc.StatusCode
T = TypeVar("T")

_text = st.text(st.characters(codec="utf-8"), max_size=20)
_names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20)
_labels = st.dictionaries(_text, _text, max_size=4)
_sizes = st.integers(0, 2**63 - 1)
_times = st.integers(-(10**18), 4 * 10**18)
_mounts = st.builds(Mount, _text, _text, st.lists(_text, max_size=4).map(tuple), target=_text)
_infos = st.builds(Info, st.sampled_from(Kind), _text, _text, _labels, _times, _times)


class Spoken:
    """A service that answers what it is told to, and remembers what it was asked.

    An answer that is an error is raised. Without an answer, a call waits until it is cancelled or
    let go.
    """

    def __init__(self, **answers: object) -> None:
        self.answers = answers
        self.asked: list[tuple[object, ...]] = []
        self.waiting = self.cancelled = 0
        self.let_go = trio.Event()

    async def _answer(self, call: str, *arguments: object) -> Any:
        self.asked.append((call, *arguments))
        if call not in self.answers:
            await self._wait()
            return ()
        await trio.lowlevel.checkpoint()
        answer = self.answers[call]
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def _wait(self) -> None:
        self.waiting += 1
        try:
            await self.let_go.wait()
        except trio.Cancelled:
            self.cancelled += 1
            raise
        finally:
            self.waiting -= 1

    async def prepare(self, key: str, parent: str, labels: Mapping[str, str]) -> Sequence[Mount]:
        return await self._answer("prepare", key, parent, labels)

    async def view(self, key: str, parent: str, labels: Mapping[str, str]) -> Sequence[Mount]:
        return await self._answer("view", key, parent, labels)

    async def mounts(self, key: str) -> Sequence[Mount]:
        return await self._answer("mounts", key)

    async def commit(self, name: str, key: str, labels: Mapping[str, str], parent: str) -> None:
        await self._answer("commit", name, key, labels, parent)

    async def remove(self, key: str) -> None:
        await self._answer("remove", key)

    async def stat(self, key: str) -> Info:
        return await self._answer("stat", key)

    async def update(self, name: str, labels: Mapping[str, str], fieldpaths: Sequence[str]) -> Info:
        return await self._answer("update", name, labels, fieldpaths)

    async def list(self, filters: Sequence[str]) -> Sequence[Info]:
        return await self._answer("list", filters)

    async def usage(self, key: str) -> Usage:
        return await self._answer("usage", key)

    async def cleanup(self) -> None:
        await self._answer("cleanup")


@asynccontextmanager
async def _serving(
    service: Spoken, address: Path, counters: CallCounters | None = None
) -> AsyncIterator[Path]:
    async def serve(task_status: trio.TaskStatus[None]) -> None:
        await server.serve(
            service,
            address,
            counters=counters or CallCounters(),
            task_status=task_status,
        )

    async with trio.open_nursery() as nursery:
        await nursery.start(serve)
        yield address
        nursery.cancel_scope.cancel()


async def _asking(address: Path, ask: Callable[[SnapshotsClient], T]) -> T:
    """What a client gets, which is synchronous, as containerd would see it."""

    def work() -> T:
        with SnapshotsClient(address) as client:
            return ask(client)

    return await trio.to_thread.run_sync(work)


async def _until(what: Callable[[], bool]) -> None:
    with trio.fail_after(_SOON):
        while not what():  # noqa: ASYNC110 - on what other threads do
            await trio.sleep(0.005)


@contextmanager
def _channel(address: Path) -> Iterator[grpc.Channel]:
    channel = open_channel(address)
    try:
        yield channel
    finally:
        channel.close()


def _request(name: str, **fields: object) -> bytes:
    return METHODS[name].request(**fields).SerializeToString()


async def _ended(call: grpc.Future) -> _CODE:
    """The code that a call ends with."""
    await _until(call.done)
    return call.code()


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    for thread in set(threading.enumerate()) - before:
        if not thread.name.startswith("Trio thread"):  # trio keeps these for ten seconds
            thread.join(_SOON)
            assert not thread.is_alive(), thread


@pytest.fixture
def address(tmp_path: Path) -> Path:
    return tmp_path / "containerd.sock"


class TestCalls:
    @settings(max_examples=30, deadline=None)
    @given(data=st.data())
    async def test_every_field_arrives(self, data: st.DataObject) -> None:
        draw = data.draw
        key, name, parent, labels = draw(_names), draw(_names), draw(_text), draw(_labels)
        filters, paths = draw(st.lists(_text, max_size=3)), draw(st.lists(_text, max_size=3))
        mounts = tuple(draw(st.lists(_mounts, max_size=3)))
        info, infos = draw(_infos), tuple(draw(st.lists(_infos, max_size=5)))
        usage = Usage(draw(_sizes), draw(_sizes))
        service = Spoken(
            prepare=mounts,
            view=mounts,
            mounts=mounts,
            commit=None,
            remove=None,
            stat=info,
            update=info,
            list=infos,
            usage=usage,
            cleanup=None,
        )

        def ask(client: SnapshotsClient) -> None:
            assert client.prepare(key, parent, labels) == mounts
            assert client.view(key, parent, labels) == mounts
            assert client.mounts(key) == mounts
            client.commit(name, key, labels, parent)
            client.remove(key)
            assert client.stat(key) == info
            assert client.update(name, labels, paths) == info
            assert client.list(filters) == infos
            assert client.usage(key) == usage
            client.cleanup()

        with TemporaryDirectory() as directory:
            async with _serving(service, Path(directory) / "s.sock") as address:
                await _asking(address, ask)
        assert service.asked == [
            ("prepare", key, parent, labels),
            ("view", key, parent, labels),
            ("mounts", key),
            ("commit", name, key, labels, parent),
            ("remove", key),
            ("stat", key),
            ("update", name, labels, tuple(paths)),
            ("list", tuple(filters)),
            ("usage", key),
            ("cleanup",),
        ]

    async def test_a_long_list_comes_in_pieces_of_a_hundred(self, address: Path) -> None:
        infos = tuple(Info(Kind.COMMITTED, f"n{n}", "", {}, n, n) for n in range(250))
        async with _serving(Spoken(list=infos), address):
            pieces = await _asking(address, lambda client: client.list_pieces())
        assert [len(piece) for piece in pieces] == [100, 100, 50]
        assert sum(pieces, ()) == infos

    async def test_messages_of_almost_16_mib(self, address: Path) -> None:
        mounts = (Mount("x" * (15 << 20), "", ()),)
        service = Spoken(prepare=mounts)
        async with _serving(service, address):
            back = await _asking(address, lambda client: client.prepare("k" * (15 << 20)))
        assert back == mounts

    async def test_calls_run_side_by_side(self, address: Path) -> None:
        service = Spoken(remove=None)
        async with _serving(service, address):
            with _channel(address) as channel:
                slow = unary(channel, "Prepare").future(_request("Prepare", key="k"))
                await _until(lambda: service.waiting == 1)
                await _asking(address, lambda client: client.remove("other"))
                service.let_go.set()
                assert await _ended(slow) is _CODE.OK


class TestRefusals:
    @pytest.mark.parametrize(
        ("error", "code"),
        [
            (errors.NotFoundError("no k", hint="look"), _CODE.NOT_FOUND),
            (errors.AlreadyExistsError("no k", hint="look"), _CODE.ALREADY_EXISTS),
            (errors.FailedPreconditionError("no k", hint="look"), _CODE.FAILED_PRECONDITION),
            (errors.InvalidArgumentError("no k", hint="look"), _CODE.INVALID_ARGUMENT),
            (errors.UnavailableError("no k", hint="look"), _CODE.UNAVAILABLE),
            (IntegrityError("no k", hint="look"), _CODE.UNAVAILABLE),
            (OSError(errno.ENOSPC, "no k: look"), _CODE.RESOURCE_EXHAUSTED),
            (OSError(errno.EDQUOT, "no k: look"), _CODE.RESOURCE_EXHAUSTED),
            (OSError(errno.EIO, "no k: look"), _CODE.INTERNAL),
        ],
        ids=lambda value: value.name if isinstance(value, _CODE) else type(value).__name__,
    )
    @pytest.mark.parametrize("call", ["stat", "list"])
    async def test_errors_have_codes(
        self, address: Path, call: str, error: Exception, code: grpc.StatusCode
    ) -> None:
        ask = {"stat": lambda client: client.stat("k"), "list": lambda client: client.list()}[call]
        async with _serving(Spoken(**{call: error}), address):
            with pytest.raises(grpc.RpcError) as caught:
                await _asking(address, ask)
        assert caught.value.code() is code
        assert "no k: look" in caught.value.details()

    @pytest.mark.parametrize(
        ("message", "details"),
        [
            ("two\nlines", "two lines"),
            ("a name of bytes: \udcff", r"a name of bytes: \udcff"),
            ("x" * 100_000, "x" * 2000),
            ("é ☃", "é ☃"),
        ],
        ids=["lines", "bytes", "long", "unicode"],
    )
    async def test_details_are_one_line_that_a_header_can_carry(
        self, address: Path, message: str, details: str
    ) -> None:
        async with _serving(Spoken(remove=FirstByteError(message)), address):
            with pytest.raises(grpc.RpcError) as caught:
                await _asking(address, lambda client: client.remove("k"))
        assert caught.value.details() == details

    async def test_a_mistake_is_logged_and_the_next_call_is_answered(
        self, address: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        async with _serving(Spoken(remove=ZeroDivisionError("oops"), cleanup=None), address):
            with pytest.raises(grpc.RpcError) as caught:
                await _asking(address, lambda client: client.remove("k"))
            await _asking(address, lambda client: client.cleanup())
        assert caught.value.code() is _CODE.INTERNAL
        assert "ZeroDivisionError('oops')" in caught.value.details()
        (record,) = [record for record in caplog.records if record.levelno >= logging.ERROR]
        assert "Remove" in record.getMessage()
        assert record.exc_info

    async def test_an_answer_that_is_no_text_is_a_mistake_too(self, address: Path) -> None:
        async with _serving(Spoken(mounts=(Mount("bind", "/\udcff", ()),)), address):
            with pytest.raises(grpc.RpcError) as caught:
                await _asking(address, lambda client: client.mounts("k"))
        assert caught.value.code() is _CODE.INTERNAL

    @pytest.mark.parametrize(
        "ask",
        [
            lambda client: client.prepare(""),
            lambda client: client.view(""),
            lambda client: client.mounts(""),
            lambda client: client.commit("", "key"),
            lambda client: client.commit("name", ""),
            lambda client: client.remove(""),
            lambda client: client.stat(""),
            lambda client: client.update("", {}),
            lambda client: client.usage(""),
        ],
    )
    async def test_names_are_needed(
        self, address: Path, ask: Callable[[SnapshotsClient], object]
    ) -> None:
        service = Spoken()
        async with _serving(service, address):
            with pytest.raises(grpc.RpcError) as caught:
                await _asking(address, ask)
        assert caught.value.code() is _CODE.INVALID_ARGUMENT
        assert service.asked == []

    @pytest.mark.parametrize("name", sorted(METHODS))
    async def test_bytes_that_are_no_request(self, address: Path, name: str) -> None:
        service = Spoken()
        async with _serving(service, address):
            with _channel(address) as channel:
                if METHODS[name].streams:
                    call = channel.unary_stream(f"/{SERVICE}/{name}")(b"\xff")
                else:
                    call = unary(channel, name).future(b"\xff")
                assert await _ended(call) is _CODE.INVALID_ARGUMENT
        assert service.asked == []

    async def test_a_request_of_more_than_16_mib(self, address: Path) -> None:
        service = Spoken()
        async with _serving(service, address):
            with pytest.raises(grpc.RpcError) as caught:
                await _asking(address, lambda client: client.remove("k" * (16 << 20)))
        assert caught.value.code() is _CODE.RESOURCE_EXHAUSTED
        assert service.asked == []

    async def test_a_call_of_another_time(self, address: Path) -> None:
        async with _serving(Spoken(), address):
            with _channel(address) as channel:
                call = unary(channel, "Rebase").future(b"")
                assert await _ended(call) is _CODE.UNIMPLEMENTED


class TestGivingUp:
    async def test_cancelling_a_call_cancels_its_work(self, address: Path) -> None:
        service, counters = Spoken(), CallCounters()
        async with _serving(service, address, counters):
            with _channel(address) as channel:
                call = unary(channel, "Prepare").future(_request("Prepare", key="k"))
                await _until(lambda: service.waiting == 1)
                call.cancel()
                await _until(lambda: counters.in_flight == 0)
        assert service.cancelled == 1
        assert [(count.method, count.code) for count in counters.snapshot()] == [
            ("Prepare", "CANCELLED")
        ]

    async def test_a_client_that_goes_away_cancels_its_calls(self, address: Path) -> None:
        service = Spoken()
        async with _serving(service, address):
            with _channel(address) as channel:
                calls = [
                    unary(channel, "Prepare").future(_request("Prepare", key=str(n)))
                    for n in range(3)
                ]
                await _until(lambda: service.waiting == len(calls))
            await _until(lambda: service.cancelled == len(calls))

    async def test_a_deadline_cancels_the_work(self, address: Path) -> None:
        service, counters = Spoken(), CallCounters()
        async with _serving(service, address, counters):
            with _channel(address) as channel:
                call = unary(channel, "Remove").future(_request("Remove", key="k"), timeout=0.5)
                assert await _ended(call) is _CODE.DEADLINE_EXCEEDED
            await _until(lambda: counters.in_flight == 0)
        assert service.cancelled == len(service.asked)

    async def test_a_call_that_waits_for_its_turn_can_be_given_up(
        self, address: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(server, "WORKERS", 1)
        service = Spoken(stat=errors.NotFoundError("no"))
        async with _serving(service, address):
            with _channel(address) as channel:
                first = unary(channel, "Prepare").future(_request("Prepare", key="first"))
                await _until(lambda: service.waiting == 1)
                second = unary(channel, "Remove").future(_request("Remove", key="second"))
                third = unary(channel, "Stat").future(_request("Stat", key="third"))
                second.cancel()
                service.let_go.set()
                assert await _ended(first) is _CODE.OK
                assert await _ended(third) is _CODE.NOT_FOUND
        assert ("prepare", "first", "", {}) in service.asked
        assert ("stat", "third") in service.asked


class TestMany:
    async def test_calls_beyond_the_bound_are_refused_and_the_others_done(
        self, address: Path
    ) -> None:
        beyond = 20
        service = Spoken()
        async with _serving(service, address):
            with _channel(address) as channel:
                remove = unary(channel, "Remove")
                calls = [
                    remove.future(_request("Remove", key=str(n)))
                    for n in range(server.CALLS_AT_ONCE + beyond)
                ]
                await _until(lambda: sum(call.done() for call in calls) >= beyond)
                await _until(lambda: service.waiting == server.WORKERS)
                assert service.waiting == len(service.asked)
                service.let_go.set()
                codes = [await _ended(call) for call in calls]
        assert codes.count(_CODE.RESOURCE_EXHAUSTED) == beyond
        assert codes.count(_CODE.OK) == server.CALLS_AT_ONCE


class TestEnding:
    async def test_calls_under_way_may_end(self, address: Path) -> None:
        service = Spoken()

        async def let_go() -> None:
            await _until(lambda: not address.exists())
            service.let_go.set()

        with _channel(address) as channel:
            async with trio.open_nursery() as nursery, _serving(service, address):
                call = unary(channel, "Remove").future(_request("Remove", key="k"))
                await _until(lambda: service.waiting == 1)
                nursery.start_soon(let_go)
            assert await _ended(call) is _CODE.OK
        assert service.cancelled == 0

    async def test_calls_that_do_not_end_are_told(
        self, address: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(server, "GRACE", 0.2)
        monkeypatch.setattr(server, "WORKERS", 2)
        service = Spoken()
        with _channel(address) as channel:
            async with _serving(service, address):
                calls = [
                    unary(channel, "Remove").future(_request("Remove", key=str(n)))
                    for n in range(5)
                ]
                await _until(lambda: service.waiting == 2)
            assert [await _ended(call) for call in calls] == [_CODE.UNAVAILABLE] * 5
            assert calls[0].details() == "the snapshotter is ending"
        assert service.cancelled == len(service.asked) == 2

    async def test_nothing_is_left(self, address: Path) -> None:
        async with _serving(Spoken(cleanup=None), address):
            await _asking(address, lambda client: client.cleanup())
            assert os.listdir(address.parent) == [address.name]
        assert os.listdir(address.parent) == []

    async def test_a_client_that_stays_connected_does_not_hold_it_up(self, address: Path) -> None:
        service = Spoken(remove=None)
        with _channel(address) as channel:
            async with _serving(service, address):
                first = unary(channel, "Remove").future(_request("Remove", key="k"))
                assert await _ended(first) is _CODE.OK
            again = unary(channel, "Remove").future(_request("Remove", key="k"))
            assert await _ended(again) is _CODE.UNAVAILABLE

    async def test_it_can_be_started_again(self, address: Path) -> None:
        for _ in range(3):
            async with _serving(Spoken(cleanup=None), address):
                await _asking(address, lambda client: client.cleanup())


class TestSocket:
    async def test_only_the_owner_may_connect(self, address: Path) -> None:
        address.parent.chmod(0o755)
        async with _serving(Spoken(), address):
            assert stat.filemode((await trio.Path(address).stat()).st_mode) == "srw-------"
            stranger = await trio.to_thread.run_sync(_connect_as_nobody, address)
        assert "PermissionError" in stranger

    async def test_until_its_mode_is_right_it_is_where_nobody_else_can_go(
        self, address: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen = []
        chmod = Path.chmod

        def watched(path: Path, mode: int) -> None:
            seen.append((address.exists(), stat.S_IMODE(path.parent.stat().st_mode)))
            chmod(path, mode)

        monkeypatch.setattr(Path, "chmod", watched)
        async with _serving(Spoken(), address):
            assert seen == [(False, 0o700)]

    async def test_what_a_dead_daemon_left_is_replaced(self, address: Path) -> None:
        half_made = address.with_name(f".{address.name}")
        half_made.mkdir()
        for stale in (address, half_made / "s"):
            with trio.socket.socket(trio.socket.AF_UNIX) as dead:
                await dead.bind(str(stale))
        async with _serving(Spoken(cleanup=None), address):
            await _asking(address, lambda client: client.cleanup())
            assert not half_made.exists()

    async def test_any_path_will_do(self, tmp_path: Path) -> None:
        address = tmp_path / "a b%20c#é?.sock"
        async with _serving(Spoken(cleanup=None), address):
            await _asking(address, lambda client: client.cleanup())

    @pytest.mark.parametrize(
        ("name", "wrong"),
        [
            ("x" * 200, "too long"),
            ("missing/s.sock", "cannot listen"),
            ("directory", "cannot listen"),
        ],
    )
    async def test_where_it_cannot_listen(self, tmp_path: Path, name: str, wrong: str) -> None:
        (tmp_path / "directory").mkdir()
        with trio.fail_after(_SOON), pytest.raises(errors.AddressError, match=wrong) as caught:
            await server.serve(Spoken(), tmp_path / name, counters=CallCounters())
        assert caught.value.hint
        assert os.listdir(tmp_path) == ["directory"]


def _connect_as_nobody(address: Path) -> str:
    program = "socket.socket(socket.AF_UNIX).connect(sys.argv[1])"
    # In its own directory: those above may be closed to others by themselves.
    enter = f"import os, socket, sys; os.chdir({str(address.parent)!r})"
    return as_nobody(program, address.name, imports=enter).stderr


class TestCounters:
    async def test_calls_are_counted_by_how_they_ended(self, address: Path) -> None:
        counters = CallCounters()
        service = Spoken(remove=None, stat=errors.NotFoundError("no"))
        async with _serving(service, address, counters):
            for _ in range(2):
                await _asking(address, lambda client: client.remove("k"))
            for key in ("k", ""):
                with pytest.raises(grpc.RpcError):
                    await _asking(address, lambda client, key=key: client.stat(key))
            with _channel(address) as channel:
                call = unary(channel, "Usage").future(_request("Usage", key="k"))
                await _until(lambda: service.waiting == 1)
                assert counters.in_flight == 1
                call.cancel()
            await _until(lambda: counters.in_flight == 0)
        ended = counters.snapshot()
        assert [(count.method, count.code, count.count) for count in ended] == [
            ("Remove", "OK", 2),
            ("Stat", "INVALID_ARGUMENT", 1),
            ("Stat", "NOT_FOUND", 1),
            ("Usage", "CANCELLED", 1),
        ]
        assert all(count.seconds >= 0 for count in ended)

    def test_seconds_add_up(self) -> None:
        counters = CallCounters()
        for seconds in (0.5, 0.25):
            counters.begin()
            counters.end("Stat", "OK", seconds)
        assert counters.snapshot() == (CallCount("Stat", "OK", 2, 0.75),)
