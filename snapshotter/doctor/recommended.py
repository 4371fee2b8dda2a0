"""The lines that containerd's configuration needs, as this node would have them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from snapshotter.doctor.configuration import CRI, CRI_IMAGES, TRANSFER

if TYPE_CHECKING:
    from pathlib import Path

NAME = "firstbyte"
"""What the snapshotter is called in containerd unless somebody has chosen another name."""

LABELS_EXPORT = "enable_remote_snapshot_annotations"
"""Tells the transfer service to label snapshots; its value is the string "true"."""

REMAP_IDS = "remap-ids"
"""The capability of snapshotters that leave the mapping of ids to the kernel (containerd 2.0)."""


@dataclass(frozen=True, slots=True)
class Expected:
    """What FirstByte's own configuration says on this node."""

    address: Path
    root: Path
    registry_config_path: Path


def proxy(expected: Expected, name: str, *, split: bool) -> str:
    """The proxy plugin."""
    lines = [
        f"[proxy_plugins.{_key(name)}]",
        '  type = "snapshot"',
        f"  address = {_text(expected.address)}",
    ]
    if split:
        lines.append(f'  capabilities = ["{REMAP_IDS}"]')
    return "\n".join([*lines, exports(expected, name, split=split)])


def exports(expected: Expected, name: str, *, split: bool) -> str:
    """What the proxy plugin tells containerd about the snapshotter."""
    lines = [f"[proxy_plugins.{_key(name)}.exports]", f"  root = {_text(expected.root)}"]
    if split:
        lines.append(f'  {LABELS_EXPORT} = "true"')
    return "\n".join(lines)


def snapshotter(name: str, *, split: bool) -> str:
    """CRI uses the snapshotter."""
    return f"{pulling_table(split=split)}\n  snapshotter = {_text(name)}"


def labels(*, split: bool) -> str:
    """CRI labels the snapshots that it asks for, where it pulls by itself."""
    return f"{pulling_table(split=split)}\n  disable_snapshot_annotations = false"


def unpack(name: str) -> str:
    """The transfer service may use the snapshotter."""
    return (
        f"[[plugins.'{TRANSFER}'.unpack_config]]\n  platform = \"linux\"\n  snapshotter = "
        + _text(name)
    )


def registry(config_path: Path, *, split: bool) -> str:
    """CRI reads the same hosts.toml files."""
    cri = CRI_IMAGES if split else CRI
    return f"[plugins.'{cri}'.registry]\n  config_path = {_text(config_path)}"


def runtimes() -> str:
    """What makes containerd 2 take a file of version 2 over."""
    return f"[plugins.'{CRI}'.containerd.runtimes.runc]\n  runtime_type = \"io.containerd.runc.v2\""


def pulling_table(*, split: bool) -> str:
    """The head of the table that has `snapshotter` in it."""
    return f"[plugins.'{CRI_IMAGES}']" if split else f"[plugins.'{CRI}'.containerd]"


def _key(name: str) -> str:
    bare = name.isascii() and name.replace("-", "").replace("_", "").isalnum()
    return name if bare else _text(name)


def _text(value: Path | str) -> str:
    """A basic string of TOML, whose escapes are those of JSON."""
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
