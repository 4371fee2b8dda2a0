"""Looks at the node, for podman."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from index.errors import FirstByteError
from snapshotter.doctor.facts import FUSE, existing, is_device, try_overlay
from snapshotter.doctor.podman import Facts, Helper, Namespace
from snapshotter.podman import rootless
from snapshotter.podman.storage_conf import StorageConf, find_storage_conf, read_storage_conf
from snapshotter.podman.versions import podman_version
from snapshotter.registry.registries_conf import RegistriesConf

if TYPE_CHECKING:
    from collections.abc import Sequence

_HELPER = "firstbyte-podman-credentials"
_REGISTRIES = "CONTAINERS_REGISTRIES_CONF"  # podman's, whatever ours is


def collect(
    conf_path: Path | None,
    unserved: Sequence[tuple[str, str]] | str,
    namespace: Namespace | str | None,
    registries_conf: Path,
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
        helper=_helper(Path(os.environ.get(_REGISTRIES) or registries_conf)),
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


def _helper(registries_conf: Path) -> Helper | str:
    try:
        named = RegistriesConf(registries_conf).auth_helper()
    except FirstByteError as error:
        return str(error)
    return Helper(
        named,
        runs=shutil.which(named) is not None,
        ours=shutil.which(_HELPER) or str(Path(sys.executable).with_name(_HELPER)),
    )


def _conf(path: Path | None) -> StorageConf | str:
    try:
        return read_storage_conf(path or find_storage_conf())
    except FirstByteError as error:
        return str(error)
