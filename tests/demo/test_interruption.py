"""Work that is to end at once ends, whatever it was at."""

from __future__ import annotations

import signal
import sys
import time
import weakref

import pytest

from snapshotter.demo import interruption
from snapshotter.demo.interruption import InterruptedBySignal, Interruption


def _computed() -> None:
    with Interruption() as interrupted, interrupted.at_once():
        signal.raise_signal(signal.SIGTERM)
        time.sleep(60)


def _signalled_while_an_object_goes() -> None:
    with Interruption() as interrupted, interrupted.at_once():
        thing = type("Thing", (), {})()
        noted = weakref.ref(thing, lambda _: signal.raise_signal(signal.SIGTERM))
        del thing
        assert noted() is None
        time.sleep(60)


def test_computing_ends_with_a_signal() -> None:
    with pytest.raises(InterruptedBySignal) as told:
        _computed()
    assert told.value.number == signal.SIGTERM


def test_a_signal_that_comes_while_an_object_goes_is_not_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Python drops what is raised then, and says so; nobody needs to know."""
    dropped: list[object] = []
    monkeypatch.setattr(interruption, "REPEAT_SECONDS", 0.05)
    monkeypatch.setattr(sys, "unraisablehook", lambda it: dropped.append(it.exc_type))
    with pytest.raises(InterruptedBySignal) as told:
        _signalled_while_an_object_goes()
    assert dropped == []
    assert told.value.number == signal.SIGTERM
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
