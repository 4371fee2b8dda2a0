"""Looks at the node, for podman."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from index.errors import FirstByteError
from snapshotter.doctor.facts import FUSE, existing, is_device, try_overlay
from snapshotter.doctor.podman import Facts, Namespace
from snapshotter.podman import rootless
from snapshotter.podman.storage_conf import StorageConf, find_storage_conf, read_storage_conf
from snapshotter.podman.versions import podman_version

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


def collect(
    conf_path: Path | None,
    unserved: Sequence[tuple[str, str]] | str,
    namespace: Namespace | str | None,
) -> Facts:
    """Everything but `unserved` and `namespace`. None looks for storage.conf."""
    is_root = os.geteuid() == 0
    conf = _conf(conf_path)
    failure, present = None, set[str]()
    if isinstance(conf, StorageConf):
        present = {path for path in conf.stores if os.path.isdir(path)}
        failure = try_overlay(existing(conf.graph_root)) if is_root else None
    return Facts(
        podman=podman_version(),
        conf=conf,
        present=present,
        fuse=is_device(FUSE),
        overlay_failure=failure,
        overlay_tried=is_root,
        unserved=unserved,
        namespace=namespace,
    )


def look_at_namespace(daemon: int) -> Namespace | None:
    """That of a user's podman, which this process is in; None for root. `daemon` is its process, or
    0 if none runs."""
    if rootless.user() is None:
        return None
    return Namespace(
        ids=rootless.mapped_ids(),
        opens_fuse=os.access(FUSE, os.R_OK | os.W_OK),
        shared=rootless.is_same_namespace(daemon) if daemon else None,
    )


def _conf(path: Path | None) -> StorageConf | str:
    try:
        return read_storage_conf(path or find_storage_conf())
    except FirstByteError as error:
        return str(error)
