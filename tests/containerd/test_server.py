"""A real gRPC client on a real socket: what is asked and answered, refused and counted."""

from __future__ import annotations

import errno
import logging
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from index.errors import FirstByteError, IntegrityError
from snapshotter.containerd import errors
from snapshotter.containerd.counters import CallCount, CallCounters
from snapshotter.containerd.messages import METHODS, SERVICE
from snapshotter.containerd.snapshots import Info, Kind, Mount, Usage
from tests.support.grpc_clients import SnapshotsClient, unary
from tests.support.spoken import Spoken, asking, channel_to, ended, request_of, serving, until

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.usefixtures("no_thread_is_left")

_CODE = grpc.StatusCode

_text = st.text(st.characters(codec="utf-8"), max_size=20)
_names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20)
_labels = st.dictionaries(_text, _text, max_size=4)
_sizes = st.integers(0, 2**63 - 1)
_times = st.integers(-(10**18), 4 * 10**18)
_mounts = st.builds(Mount, _text, _text, st.lists(_text, max_size=4).map(tuple), target=_text)
_infos = st.builds(Info, st.sampled_from(Kind), _text, _text, _labels, _times, _times)


class TestCalls:
    @settings(max_examples=30)
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
            async with serving(service, Path(directory) / "s.sock") as address:
                await asking(address, ask)
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
        async with serving(Spoken(list=infos), address):
            pieces = await asking(address, lambda client: client.list_pieces())
        assert [len(piece) for piece in pieces] == [100, 100, 50]
        assert sum(pieces, ()) == infos

    async def test_messages_of_almost_16_mib(self, address: Path) -> None:
        mounts = (Mount("x" * (15 << 20), "", ()),)
        service = Spoken(prepare=mounts)
        async with serving(service, address):
            back = await asking(address, lambda client: client.prepare("k" * (15 << 20)))
        assert back == mounts

    async def test_calls_run_side_by_side(self, address: Path) -> None:
        service = Spoken(remove=None)
        async with serving(service, address):
            with channel_to(address) as channel:
                slow = unary(channel, "Prepare").future(request_of("Prepare", key="k"))
                await until(lambda: service.waiting == 1)
                await asking(address, lambda client: client.remove("other"))
                service.let_go.set()
                assert await ended(slow) is _CODE.OK


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
        async with serving(Spoken(**{call: error}), address):
            with pytest.raises(grpc.RpcError) as caught:
                await asking(address, ask)
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
        async with serving(Spoken(remove=FirstByteError(message)), address):
            with pytest.raises(grpc.RpcError) as caught:
                await asking(address, lambda client: client.remove("k"))
        assert caught.value.details() == details

    async def test_a_mistake_is_logged_and_the_next_call_is_answered(
        self, address: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        async with serving(Spoken(remove=ZeroDivisionError("oops"), cleanup=None), address):
            with pytest.raises(grpc.RpcError) as caught:
                await asking(address, lambda client: client.remove("k"))
            await asking(address, lambda client: client.cleanup())
        assert caught.value.code() is _CODE.INTERNAL
        assert "ZeroDivisionError('oops')" in caught.value.details()
        (record,) = [record for record in caplog.records if record.levelno >= logging.ERROR]
        assert "Remove" in record.getMessage()
        assert record.exc_info

    async def test_an_answer_that_is_no_text_is_a_mistake_too(self, address: Path) -> None:
        async with serving(Spoken(mounts=(Mount("bind", "/\udcff", ()),)), address):
            with pytest.raises(grpc.RpcError) as caught:
                await asking(address, lambda client: client.mounts("k"))
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
        async with serving(service, address):
            with pytest.raises(grpc.RpcError) as caught:
                await asking(address, ask)
        assert caught.value.code() is _CODE.INVALID_ARGUMENT
        assert service.asked == []

    @pytest.mark.parametrize("name", sorted(METHODS))
    async def test_bytes_that_are_no_request(self, address: Path, name: str) -> None:
        service = Spoken()
        async with serving(service, address):
            with channel_to(address) as channel:
                if METHODS[name].streams:
                    call = channel.unary_stream(f"/{SERVICE}/{name}")(b"\xff")
                else:
                    call = unary(channel, name).future(b"\xff")
                assert await ended(call) is _CODE.INVALID_ARGUMENT
        assert service.asked == []

    async def test_a_request_of_more_than_16_mib(self, address: Path) -> None:
        service = Spoken()
        async with serving(service, address):
            with pytest.raises(grpc.RpcError) as caught:
                await asking(address, lambda client: client.remove("k" * (16 << 20)))
        assert caught.value.code() is _CODE.RESOURCE_EXHAUSTED
        assert service.asked == []

    async def test_a_call_of_another_time(self, address: Path) -> None:
        async with serving(Spoken(), address):
            with channel_to(address) as channel:
                call = unary(channel, "Rebase").future(b"")
                assert await ended(call) is _CODE.UNIMPLEMENTED


class TestCounters:
    async def test_calls_are_counted_by_how_they_ended(self, address: Path) -> None:
        counters = CallCounters()
        service = Spoken(remove=None, stat=errors.NotFoundError("no"))
        async with serving(service, address, counters):
            for _ in range(2):
                await asking(address, lambda client: client.remove("k"))
            for key in ("k", ""):
                with pytest.raises(grpc.RpcError):
                    await asking(address, lambda client, key=key: client.stat(key))
            with channel_to(address) as channel:
                call = unary(channel, "Usage").future(request_of("Usage", key="k"))
                await until(lambda: service.waiting == 1)
                assert counters.in_flight == 1
                call.cancel()
            await until(lambda: counters.in_flight == 0)
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
