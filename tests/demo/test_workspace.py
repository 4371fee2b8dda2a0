"""The demo's workspace: whatever was started or mounted in it is gone when it closes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from snapshotter.demo.errors import DemoError
from snapshotter.demo.interruption import InterruptedBySignal, Interruption
from snapshotter.demo.workspace import Workspace, marked_processes, mounts_below, stop_group
from snapshotter.mounts.syscalls import MountFlag, mount

SECONDS = 20.0

# A daemon as hard to find as they come: a new session, another directory, its parent gone.
DAEMON = """
import os, sys, time
if os.fork(): os._exit(0)
os.setsid()
if os.fork(): os._exit(0)
os.chdir("/")
{prepare}
print("up", flush=True)
os.close(1)
time.sleep(600)
"""
STUBBORN = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)"


def spare_interruption(seconds: float, number: signal.Signals) -> threading.Timer:
    """Send this process a signal after a while."""
    timer = threading.Timer(seconds, os.kill, (os.getpid(), number))
    timer.start()
    return timer


def state_of(pid: int) -> str:
    """A zombie is what an init that does not reap makes of a process that has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return "gone"
    return "zombie" if "(zombie)" in status else "alive"


def test_run_returns_what_the_program_prints(workspace: Workspace) -> None:
    assert workspace.run(["echo", "hello"], seconds=SECONDS) == "hello\n"


def test_a_failing_program_is_an_error_with_the_end_of_what_it_said(workspace: Workspace) -> None:
    script = "seq 1 100; seq 101 200 >&2; exit 3"
    with pytest.raises(DemoError, match="failed with status 3") as caught:
        workspace.run(["sh", "-c", script], seconds=SECONDS)
    assert caught.value.hint.splitlines()[-1] == "200"
    assert len(caught.value.hint.splitlines()) < 20


def test_a_program_that_is_not_installed_is_an_error(workspace: Workspace) -> None:
    with pytest.raises(DemoError, match="no-such-program is not installed"):
        workspace.run(["no-such-program"], seconds=SECONDS)


def test_a_program_that_takes_too_long_is_ended_with_its_children(workspace: Workspace) -> None:
    with pytest.raises(DemoError, match="took too long"):
        workspace.run(["sh", "-c", "sleep 600 & sleep 600"], seconds=0.2)
    end = time.monotonic() + SECONDS
    while marked_processes(workspace.path):
        assert time.monotonic() < end


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_what_runs(workspace: Workspace, number: signal.Signals) -> None:
    timer = spare_interruption(0.2, number)
    with pytest.raises(InterruptedBySignal) as caught:
        workspace.run(["sleep", "600"], seconds=SECONDS)
    timer.join()
    assert caught.value.number == number
    assert marked_processes(workspace.path) == []  # it was waited for


def test_handlers_of_signals_are_put_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with Interruption():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before


def test_after_disarming_signals_change_nothing() -> None:
    with Interruption() as interruption:
        interruption.disarm()
        os.kill(os.getpid(), signal.SIGINT)
        interruption.sleep(0.01)
        interruption.check()


def test_steps_are_undone_last_first_and_a_failing_one_stops_none() -> None:
    done: list[str] = []
    warnings: list[str] = []

    def fail() -> None:
        raise DemoError("stuck")

    with Interruption() as interruption, Workspace(interruption, warnings.append) as workspace:
        workspace.defer("first", lambda: done.append("first"))
        workspace.defer("second", fail)
        workspace.defer("third", lambda: done.append("third"))
    assert done == ["third", "first"]
    assert warnings == ["second: stuck"]
    assert not workspace.path.exists()


def test_it_closes_after_a_failure_too() -> None:
    workspace = Workspace(Interruption(), pytest.fail)

    def fail() -> None:
        with workspace:
            (workspace.directory("a", "b") / "file").write_text("x")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert not workspace.path.exists()


@pytest.mark.parametrize("prepare", ["", STUBBORN], ids=["polite", "stubborn"])
def test_daemons_that_left_are_found_and_ended(prepare: str) -> None:
    with Interruption() as interruption, Workspace(interruption, pytest.fail) as workspace:
        program = [sys.executable, "-c", DAEMON.format(prepare=prepare)]
        reader, writer = os.pipe()
        process = workspace.start(program, output=writer, errors=subprocess.DEVNULL)
        os.close(writer)
        with open(reader) as output:
            assert output.read() == "up\n"
        process.wait()
        (pid,) = marked_processes(workspace.path)
    assert marked_processes(workspace.path) == []
    assert state_of(pid) in ("gone", "zombie")


def test_processes_of_others_are_left_alone() -> None:
    with subprocess.Popen(["sleep", "600"]) as other:
        with Interruption() as interruption, Workspace(interruption, pytest.fail):
            pass
        assert other.poll() is None
        other.kill()


@pytest.mark.root
def test_mounts_below_are_taken_down_even_if_in_use() -> None:
    with Interruption() as interruption, Workspace(interruption, pytest.fail) as workspace:
        outer = workspace.directory("outer place")
        mount("tmpfs", outer, "tmpfs", MountFlag(0))
        inner = workspace.directory("outer place", "inner")
        mount("tmpfs", inner, "tmpfs", MountFlag(0))
        busy = (inner / "file").open("w")
        assert mounts_below(workspace.path) == [inner, outer]
    busy.close()
    assert mounts_below(workspace.path) == []
    assert not workspace.path.exists()


@pytest.mark.root
def test_nothing_is_removed_from_what_was_mounted(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("x")
    with Interruption() as interruption, Workspace(interruption, pytest.fail) as workspace:
        mount(str(tmp_path), workspace.directory("bound"), "", MountFlag.BIND)
    assert (tmp_path / "precious").read_text() == "x"


def test_a_group_is_ended_with_sigkill_if_sigterm_does_not_do(workspace: Workspace) -> None:
    reader, writer = os.pipe()
    process = workspace.start(
        ["sh", "-c", "trap 'echo no' TERM; echo up; while :; do sleep 0.05; done"],
        output=writer,
        errors=subprocess.DEVNULL,
    )
    os.close(writer)
    with open(reader) as output:
        assert output.readline() == "up\n"
        stop_group(process)
        assert output.read() == "no\n"
    assert process.returncode == -signal.SIGKILL


def test_waiting_sees_a_descriptor_at_once_and_a_deadline_otherwise(workspace: Workspace) -> None:
    reader, writer = os.pipe()
    assert not workspace.interruption.wait(reader, 0.0)
    threading.Timer(0.05, os.write, (writer, b"x")).start()
    assert workspace.interruption.wait(reader, SECONDS)
    assert os.read(reader, 1) == b"x"
    os.close(reader)
    os.close(writer)


def test_sleeping_takes_its_time(workspace: Workspace) -> None:
    start = time.monotonic()
    workspace.interruption.sleep(0.15)
    assert time.monotonic() - start >= 0.15
