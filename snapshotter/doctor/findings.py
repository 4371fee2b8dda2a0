"""What an examination finds."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class State(enum.Enum):
    """How it stands with one thing that was looked at."""

    OK = "ok"
    WARNING = "warning"  # works, but not as well as it could, or not for everything
    PROBLEM = "problem"  # images are not served lazily, or nothing works at all
    SKIPPED = "skipped"  # could not be judged; `found` says why


@dataclass(frozen=True, slots=True)
class Finding:
    """`check` is a short, stable name. `found` is one line on what is there. `mend` says what to do
    about it: sentences, and lines to be put into a file as they are; it is empty if all is well.
    """

    check: str
    state: State
    found: str
    mend: str = ""


def ok(check: str, found: str) -> Finding:
    return Finding(check, State.OK, _line(found))


def warning(check: str, found: str, mend: str) -> Finding:
    return Finding(check, State.WARNING, _line(found), mend)


def problem(check: str, found: str, mend: str) -> Finding:
    return Finding(check, State.PROBLEM, _line(found), mend)


def skipped(check: str, why: str, mend: str = "") -> Finding:
    return Finding(check, State.SKIPPED, _line(why), mend)


def _line(text: str) -> str:
    """One line that is safe to print, whatever names and messages of others are in it."""
    return "".join(one if one.isprintable() else " " for one in text)


def any_problem(findings: list[Finding]) -> bool:
    """Whether something has to be mended."""
    return any(finding.state is State.PROBLEM for finding in findings)
