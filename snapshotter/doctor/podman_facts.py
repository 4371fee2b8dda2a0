"""Looks at the node, for podman."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from index.errors import FirstByteError
from snapshotter.doctor.facts import FUSE, existing, is_device, try_overlay
from snapshotter.doctor.podman import Facts, store_path
from snapshotter.podman.storage_conf import StorageConf, find_storage_conf, read_storage_conf
from snapshotter.podman.versions import podman_version

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


def collect(conf_path: Path | None, unserved: Sequence[tuple[str, str]] | str) -> Facts:
    """Everything but `unserved`, which is the daemon's own account. None looks for storage.conf."""
    is_root = os.geteuid() == 0
    conf = _conf(conf_path)
    failure, present = None, set[str]()
    if isinstance(conf, StorageConf):
        present = {
            path
            for path in (*conf.image_stores, *map(store_path, conf.layer_stores))
            if os.path.isdir(path)
        }
        failure = try_overlay(existing(conf.graph_root)) if is_root else None
    return Facts(
        podman=podman_version(),
        conf=conf,
        present=present,
        fuse=is_device(FUSE),
        overlay_failure=failure,
        overlay_tried=is_root,
        unserved=unserved,
    )


def _conf(path: Path | None) -> StorageConf | str:
    try:
        return read_storage_conf(path or find_storage_conf())
    except FirstByteError as error:
        return str(error)
