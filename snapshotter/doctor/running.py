"""Judges what runs: containerd with the plugin in it, the daemon behind it, and what came of it."""

from __future__ import annotations

import stat
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from snapshotter.doctor.findings import Finding, ok, problem, skipped, warning
from snapshotter.doctor.recommended import LABELS_EXPORT

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from snapshotter.doctor.versions import Version

SNAPSHOTTER_TYPE = "io.containerd.snapshotter.v1"

NO_LABELS = "no-labels"
"""The kind of fallback that has no image's name; the daemon counts them, too."""

_PRIVATE = 0o600
_FALLBACKS = 5  # as many are shown; `firstbyte status` has all
_RESTART = "restart containerd after every change of its configuration"
_TRY = "crictl pull docker.io/library/python:3.12"
_START = "firstbyte daemon"
_WATCHED = (
    ("io.containerd.transfer.v1", "local"),
    ("io.containerd.cri.v1", "images"),
    ("io.containerd.grpc.v1", "cri"),
)


@dataclass(frozen=True, slots=True)
class Plugin:
    """A plugin of a running containerd. `error` is why it failed to load, or empty."""

    type: str
    id: str
    error: str = ""
    exports: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Socket:
    """What is at a path: type and permissions as in st_mode, and the owner."""

    mode: int
    owner: int


class Fallback(Protocol):
    """An image that the daemon left to an ordinary pull."""

    @property
    def reference(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def reason(self) -> str: ...


class Served(Protocol):
    """What the daemon does for containerd. `idmapped` is why ids cannot be mapped, or empty."""

    @property
    def lazy_layers(self) -> int: ...
    @property
    def ordinary_layers(self) -> int: ...
    @property
    def without_labels(self) -> int: ...
    @property
    def idmapped(self) -> str: ...
    @property
    def fallbacks(self) -> Sequence[Fallback]: ...


def judge_version(version: Version | None, problem_found: str) -> Finding:
    """Is containerd there?"""
    check = "containerd"
    if version is None:
        return problem(check, problem_found, "install containerd 1.6 or later, or start it")
    if (version.major, version.minor) < (1, 6):
        return problem(check, f"version {version}", "1.6 is the oldest that FirstByte works with")
    return ok(check, f"version {version}")


def judge_socket(path: Path, there: Socket | None) -> Finding:
    """Is the daemon's socket what it should be?"""
    check = "socket"
    if there is None:
        return problem(check, f"{path} does not exist", f"start the daemon: {_START}")
    if not stat.S_ISSOCK(there.mode):
        return problem(check, f"{path} is no socket", f"remove it, then start the daemon: {_START}")
    mode = stat.S_IMODE(there.mode)
    if there.owner != 0:
        return problem(
            check, f"{path} belongs to user {there.owner}", "the daemon has to be started by root"
        )
    if mode != _PRIVATE:
        return warning(
            check, f"{path} has mode {mode:04o}: others may be able to use it", f"chmod 600 {path}"
        )
    return ok(check, f"{path}, for root alone")


def judge_answer(path: Path, there: Socket | None, failure: str | None) -> Finding:
    """Does the daemon answer containerd's calls? `failure` is why not."""
    check = "daemon"
    if there is None:
        return skipped(check, "there is no socket to ask at")
    if failure is None:
        return ok(check, "the daemon answers")
    return problem(check, f"no answer at {path} ({failure})", f"start the daemon: {_START}")


def judge_plugins(
    plugins: Sequence[Plugin] | str, name: str, *, labels_exported: bool
) -> list[Finding]:
    """Has the running containerd loaded the plugin? A text says why its plugins are unknown.

    `labels_exported` is whether its configuration has the export that asks for labels.
    """
    check = "plugin-loaded"
    if isinstance(plugins, str):
        return [skipped(check, plugins, "run this as root while containerd runs")]
    ours = [one for one in plugins if (one.type, one.id) == (SNAPSHOTTER_TYPE, name)]
    findings = [
        problem(check, f"{one.type}.{one.id} did not load ({one.error})", _RESTART)
        for one in plugins
        if one.error and ((one.type, one.id) in _WATCHED or one in ours)
    ]
    if not ours:
        return [*findings, problem(check, f"containerd has no snapshotter {name}", _RESTART)]
    if labels_exported and ours[0].exports.get(LABELS_EXPORT) != "true":
        findings.append(
            problem(check, "containerd runs with an older configuration than its file", _RESTART)
        )
    return findings or [ok(check, f"containerd has the snapshotter {name}")]


def judge_served(served: Served | None, why_unknown: str) -> list[Finding]:
    """Do labels arrive, and are images served lazily?"""
    check = "images"
    if served is None:
        return [skipped(check, why_unknown, f"start the daemon: {_START}")]
    if not (served.lazy_layers or served.ordinary_layers or served.without_labels):
        return [skipped(check, "no image has been pulled yet", f"try: {_TRY}")]
    counts = f"{served.lazy_layers} layers lazy, {served.ordinary_layers} ordinary"
    findings = []
    if served.without_labels and not served.lazy_layers:
        findings.append(
            problem(
                check,
                f"{counts}; {served.without_labels} came without the labels that name their image",
                "see the check labels; ctr before 2.1, and nerdctl, set none: pull with crictl",
            )
        )
    elif served.without_labels:
        findings.append(
            warning(
                check,
                f"{counts}; {served.without_labels} came without the labels that name their image",
                "some client pulls without them: ctr before 2.1, or nerdctl",
            )
        )
    else:
        findings.append(ok(check, counts))
    named = [one for one in served.fallbacks if one.kind != NO_LABELS]
    findings += [
        warning(
            "fallback",
            f"{one.reference} was pulled the ordinary way: {one.reason}",
            f'see docs/containerd.md, "What falls back to an ordinary pull", {one.kind}',
        )
        for one in named[:_FALLBACKS]
    ]
    return findings
