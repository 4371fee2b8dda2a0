"""The examination for containerd: from facts to findings, without I/O."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from snapshotter.doctor import recommended
from snapshotter.doctor.configuration import Configuration, ConfigurationError, load, table
from snapshotter.doctor.configured import judge_configuration, proxy_name
from snapshotter.doctor.findings import Finding, problem, skipped
from snapshotter.doctor.node import judge_fuse, judge_kernel, judge_overlay
from snapshotter.doctor.running import (
    judge_answer,
    judge_plugins,
    judge_served,
    judge_socket,
    judge_version,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from snapshotter.doctor.configuration import Files
    from snapshotter.doctor.recommended import Expected
    from snapshotter.doctor.running import Plugin, Served, Socket
    from snapshotter.doctor.versions import Version

_FROM_CONFIGURATION = (
    "proxy-plugin",
    "snapshotter",
    "labels",
    "registry-hosts",
    "user-namespaces",
)


@dataclass(frozen=True, slots=True)
class Facts:
    """What is the case on a node. A text in place of a value says why the value is unknown."""

    containerd: Version | str
    kernel: Version | None
    plugins: Sequence[Plugin] | str
    socket: Socket | None
    answer_failure: str | None
    fuse: bool
    overlay_failure: str | None
    overlay_tried: bool
    served: Served | str


def examine(facts: Facts, expected: Expected, path: Path, files: Files) -> list[Finding]:
    """All that is to be said, in the order in which it is to be mended."""
    version = None if isinstance(facts.containerd, str) else facts.containerd
    unknown = facts.containerd if isinstance(facts.containerd, str) else ""
    findings = [judge_version(version, unknown)]
    idmap_failure = None if isinstance(facts.served, str) else facts.served.idmapped
    configuration = _load(path, files, version)
    if isinstance(configuration, Configuration):
        findings += judge_configuration(configuration, expected, version, idmap_failure)
        name = proxy_name(configuration, expected) or recommended.NAME
        exports = table(configuration.proxies.get(name, {}), "exports")
        labels_exported = exports.get(recommended.LABELS_EXPORT) == "true"
        # before 2.0 exports of proxy plugins are not among those of the loaded ones
        labels_exported = labels_exported and configuration.split
    else:
        findings.append(configuration)
        findings += [
            skipped(check, "the configuration cannot be read") for check in _FROM_CONFIGURATION
        ]
        name, labels_exported = recommended.NAME, False
    findings.append(judge_socket(expected.address, facts.socket))
    findings.append(judge_answer(expected.address, facts.socket, facts.answer_failure))
    findings += judge_plugins(facts.plugins, name, labels_exported=labels_exported)
    findings.append(judge_kernel(facts.kernel))
    findings.append(judge_fuse(usable=facts.fuse))
    findings.append(judge_overlay(expected.root, facts.overlay_failure, tried=facts.overlay_tried))
    served = facts.served
    if isinstance(served, str):
        findings += judge_served(None, served)
    else:
        findings += judge_served(served, "")
    return findings


def _load(path: Path, files: Files, version: Version | None) -> Configuration | Finding:
    check = "configuration"
    try:
        return load(path, files, version)
    except ConfigurationError as error:
        return problem(check, error.message, error.hint or "repair it; containerd needs it, too")
    except FileNotFoundError:
        return problem(
            check,
            f"{path} does not exist: containerd runs with its defaults",
            "make one: containerd config default, or see docs/containerd.md",
        )
    except OSError as error:
        return problem(check, f"{path} cannot be read ({error.strerror})", "run this as root")
