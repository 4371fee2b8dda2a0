"""A real gRPC client on a real socket: calls that are given up, too many at once, and the end."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import grpc
import pytest
import trio

from snapshotter.containerd import errors, server
from snapshotter.containerd.counters import CallCounters
from tests.support.grpc_clients import unary
from tests.support.nobody import as_nobody
from tests.support.spoken import SOON, Spoken, asking, channel_to, ended, request_of, serving, until

pytestmark = pytest.mark.usefixtures("no_thread_is_left")

_CODE = grpc.StatusCode


class TestGivingUp:
    async def test_cancelling_a_call_cancels_its_work(self, address: Path) -> None:
        service, counters = Spoken(), CallCounters()
        async with serving(service, address, counters):
            with channel_to(address) as channel:
                call = unary(channel, "Prepare").future(request_of("Prepare", key="k"))
                await until(lambda: service.waiting == 1)
                call.cancel()
                await until(lambda: counters.in_flight == 0)
        assert service.cancelled == 1
        assert [(count.method, count.code) for count in counters.snapshot()] == [
            ("Prepare", "CANCELLED")
        ]

    async def test_a_client_that_goes_away_cancels_its_calls(self, address: Path) -> None:
        service = Spoken()
        async with serving(service, address):
            with channel_to(address) as channel:
                calls = [
                    unary(channel, "Prepare").future(request_of("Prepare", key=str(n)))
                    for n in range(3)
                ]
                await until(lambda: service.waiting == len(calls))
            await until(lambda: service.cancelled == len(calls))

    async def test_a_deadline_cancels_the_work(self, address: Path) -> None:
        service, counters = Spoken(), CallCounters()
        async with serving(service, address, counters):
            with channel_to(address) as channel:
                call = unary(channel, "Remove").future(request_of("Remove", key="k"), timeout=0.5)
                assert await ended(call) is _CODE.DEADLINE_EXCEEDED
            await until(lambda: counters.in_flight == 0)
        assert service.cancelled == len(service.asked)

    async def test_a_call_that_waits_for_its_turn_can_be_given_up(
        self, address: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(server, "WORKERS", 1)
        service = Spoken(stat=errors.NotFoundError("no"))
        async with serving(service, address):
            with channel_to(address) as channel:
                first = unary(channel, "Prepare").future(request_of("Prepare", key="first"))
                await until(lambda: service.waiting == 1)
                second = unary(channel, "Remove").future(request_of("Remove", key="second"))
                third = unary(channel, "Stat").future(request_of("Stat", key="third"))
                second.cancel()
                service.let_go.set()
                assert await ended(first) is _CODE.OK
                assert await ended(third) is _CODE.NOT_FOUND
        assert ("prepare", "first", "", {}) in service.asked
        assert ("stat", "third") in service.asked


class TestMany:
    async def test_calls_beyond_the_bound_are_refused_and_the_others_done(
        self, address: Path
    ) -> None:
        beyond = 20
        service = Spoken()
        async with serving(service, address):
            with channel_to(address) as channel:
                remove = unary(channel, "Remove")
                calls = [
                    remove.future(request_of("Remove", key=str(n)))
                    for n in range(server.CALLS_AT_ONCE + beyond)
                ]
                await until(lambda: sum(call.done() for call in calls) >= beyond)
                await until(lambda: service.waiting == server.WORKERS)
                assert service.waiting == len(service.asked)
                service.let_go.set()
                codes = [await ended(call) for call in calls]
        assert codes.count(_CODE.RESOURCE_EXHAUSTED) == beyond
        assert codes.count(_CODE.OK) == server.CALLS_AT_ONCE


class TestEnding:
    async def test_calls_under_way_may_end(self, address: Path) -> None:
        service = Spoken()

        async def let_go() -> None:
            await until(lambda: not address.exists())
            service.let_go.set()

        with channel_to(address) as channel:
            async with trio.open_nursery() as nursery, serving(service, address):
                call = unary(channel, "Remove").future(request_of("Remove", key="k"))
                await until(lambda: service.waiting == 1)
                nursery.start_soon(let_go)
            assert await ended(call) is _CODE.OK
        assert service.cancelled == 0

    async def test_calls_that_do_not_end_are_told(
        self, address: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(server, "GRACE", 0.2)
        monkeypatch.setattr(server, "WORKERS", 2)
        service = Spoken()
        with channel_to(address) as channel:
            async with serving(service, address):
                calls = [
                    unary(channel, "Remove").future(request_of("Remove", key=str(n)))
                    for n in range(5)
                ]
                await until(lambda: service.waiting == 2)
            assert [await ended(call) for call in calls] == [_CODE.UNAVAILABLE] * 5
            assert calls[0].details() == "the snapshotter is ending"
        assert service.cancelled == len(service.asked) == 2

    async def test_nothing_is_left(self, address: Path) -> None:
        async with serving(Spoken(cleanup=None), address):
            await asking(address, lambda client: client.cleanup())
            assert os.listdir(address.parent) == [address.name]
        assert os.listdir(address.parent) == []

    async def test_a_client_that_stays_connected_does_not_hold_it_up(self, address: Path) -> None:
        service = Spoken(remove=None)
        with channel_to(address) as channel:
            async with serving(service, address):
                first = unary(channel, "Remove").future(request_of("Remove", key="k"))
                assert await ended(first) is _CODE.OK
            again = unary(channel, "Remove").future(request_of("Remove", key="k"))
            assert await ended(again) is _CODE.UNAVAILABLE

    async def test_it_can_be_started_again(self, address: Path) -> None:
        for _ in range(3):
            async with serving(Spoken(cleanup=None), address):
                await asking(address, lambda client: client.cleanup())


class TestSocket:
    async def test_only_the_owner_may_connect(self, address: Path) -> None:
        address.parent.chmod(0o755)
        async with serving(Spoken(), address):
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
        async with serving(Spoken(), address):
            assert seen == [(False, 0o700)]

    async def test_what_a_dead_daemon_left_is_replaced(self, address: Path) -> None:
        half_made = address.with_name(f".{address.name}")
        half_made.mkdir()
        for stale in (address, half_made / "s"):
            with trio.socket.socket(trio.socket.AF_UNIX) as dead:
                await dead.bind(str(stale))
        async with serving(Spoken(cleanup=None), address):
            await asking(address, lambda client: client.cleanup())
            assert not half_made.exists()

    async def test_any_path_will_do(self, tmp_path: Path) -> None:
        address = tmp_path / "a b%20c#é?.sock"
        async with serving(Spoken(cleanup=None), address):
            await asking(address, lambda client: client.cleanup())

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
        with trio.fail_after(SOON), pytest.raises(errors.AddressError, match=wrong) as caught:
            await server.serve(Spoken(), tmp_path / name, counters=CallCounters())
        assert caught.value.hint
        assert os.listdir(tmp_path) == ["directory"]


def _connect_as_nobody(address: Path) -> str:
    program = "socket.socket(socket.AF_UNIX).connect(sys.argv[1])"
    # In its own directory: those above may be closed to others by themselves.
    enter = f"import os, socket, sys; os.chdir({str(address.parent)!r})"
    return as_nobody(program, address.name, imports=enter).stderr
