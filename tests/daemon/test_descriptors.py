"""Descriptors that are kept by a process that does nothing else."""

from __future__ import annotations

import os
import select
import signal
import socket
import stat
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from snapshotter.daemon.descriptors import Holder
from tests.support.instance import Instance, instance, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def here() -> Iterator[Instance]:
    """An instance whose state directory the holder's socket is in."""
    with instance() as made:
        made.state.mkdir(mode=0o700)
        yield made


@pytest.fixture
def address(here: Instance) -> Path:
    return here.state / "holder.sock"


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    readable, writable = os.pipe()
    yield readable, writable
    os.close(readable)
    os.close(writable)


def test_what_is_kept_comes_back_by_name(address: Path, pipe: tuple[int, int]) -> None:
    readable, writable = pipe
    Holder(address).keep("fuse", writable)
    Holder(address).keep("containerd", readable)
    kept = Holder(address).kept()
    assert set(kept) == {"fuse", "containerd"}
    os.write(kept["fuse"], b"x")
    assert os.read(kept["containerd"], 10) == b"x"
    assert not any(map(os.get_inheritable, kept.values()))
    for descriptor in kept.values():
        os.close(descriptor)
    Holder(address).forget("fuse")
    Holder(address).forget("containerd")


def test_it_ends_with_the_last_one(here: Instance, address: Path, pipe: tuple[int, int]) -> None:
    holder = Holder(address)
    holder.keep("a", pipe[0])
    holder.keep("b", pipe[1])
    holder.forget("a")
    holder.forget("nothing of that name")
    assert len(here.holders()) == 1
    holder.forget("b")
    wait_until(lambda: here.holders() == [])
    wait_until(lambda: not address.exists())


def test_nothing_is_kept_where_no_holder_is(address: Path) -> None:
    assert Holder(address).kept() == {}
    Holder(address).forget("anything")


def test_a_name_is_kept_once(address: Path, pipe: tuple[int, int]) -> None:
    Holder(address).keep("a", pipe[0])
    Holder(address).keep("a", pipe[1])
    (descriptor,) = Holder(address).kept().values()
    os.write(descriptor, b"x")
    os.close(descriptor)
    Holder(address).forget("a")


def test_only_its_owner_may_talk_to_it(address: Path, pipe: tuple[int, int]) -> None:
    Holder(address).keep("a", pipe[0])
    assert stat.S_IMODE(address.stat().st_mode) == 0o600
    Holder(address).forget("a")


def test_what_a_dead_holder_left_is_replaced(
    here: Instance, address: Path, pipe: tuple[int, int]
) -> None:
    Holder(address).keep("a", pipe[0])
    for pid in here.holders():
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: here.holders() == [])
    assert Holder(address).kept() == {}
    Holder(address).keep("b", pipe[1])
    (descriptor,) = Holder(address).kept().values()
    os.close(descriptor)
    Holder(address).forget("b")


def test_last_words_are_written_when_a_process_ends(address: Path, pipe: tuple[int, int]) -> None:
    readable, writable = pipe
    Holder(address).keep("a", writable)
    program = (
        "import sys, pathlib; from snapshotter.daemon.descriptors import Holder;"
        "holder = Holder(pathlib.Path(sys.argv[1])); holder.at_end('a', sys.argv[2].encode());"
        "print('ready', flush=True); sys.stdin.read()"
    )
    for words in (b"first", b"second"):
        with subprocess.Popen(
            [sys.executable, "-c", program, address, words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        ) as process:
            assert process.stdout
            assert process.stdout.readline() == b"ready\n"
            Holder(address).keep("b", readable)  # others may speak meanwhile
            assert select.select([readable], [], [], 0)[0] == []
            process.kill()
        assert os.read(readable, 100) == words
    Holder(address).forget("a")
    Holder(address).forget("b")


def test_nobody_needs_a_holder_to_have_last_words(address: Path) -> None:
    Holder(address).at_end("a", b"words")


@pytest.mark.parametrize(
    "message", [b"?", b"K", b"Kname", b"A and more", b"W", b"Wother\0words", b"\0" * 4000]
)
def test_nonsense_does_not_end_it(address: Path, pipe: tuple[int, int], message: bytes) -> None:
    Holder(address).keep("a", pipe[0])
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:
        client.connect(os.fspath(address))
        client.send(message)
        assert client.recv(100) == b"what?"
    (descriptor,) = Holder(address).kept().values()
    os.close(descriptor)
    Holder(address).forget("a")


def test_signals_that_end_daemons_do_not_end_it(
    here: Instance, address: Path, pipe: tuple[int, int]
) -> None:
    Holder(address).keep("a", pipe[0])
    for pid in here.holders():
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            os.kill(pid, number)
    (descriptor,) = Holder(address).kept().values()
    os.close(descriptor)
    Holder(address).forget("a")
