"""The examination for podman: from facts to findings, without I/O."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from snapshotter.doctor.findings import Finding, ok, problem, skipped, warning
from snapshotter.doctor.node import judge_fuse, judge_overlay
from snapshotter.podman import rootless
from snapshotter.podman.versions import (
    ASKS_FOR_BLOBS,
    ASKS_FOR_TABLES,
    FORGETS_LAYERS,
    HANDS_CREDENTIALS,
)

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence
    from pathlib import Path

    from snapshotter.podman.storage_conf import StorageConf

_SHOWN = 5  # images that are not served; `firstbyte podman ls` has all


@dataclass(frozen=True, slots=True)
class Namespace:
    """Where a user's podman works. `ids` counts its user IDs; `opens_fuse` says whether file
    systems can be served in there; `shared` whether the daemon is in there, or None if none runs.
    """

    ids: int
    opens_fuse: bool
    shared: bool | None


@dataclass(frozen=True, slots=True)
class Helper:
    """What registries.conf names for handing credentials to layer stores, or "", and whether it can
    be run. `ours` is where our own program is."""

    named: str
    runs: bool
    ours: str


@dataclass(frozen=True, slots=True)
class Facts:
    """What is the case on a node. `conf` is a text if storage.conf cannot be read; `present` are
    those of the stores that it names that are there. `unserved` are images of the image store that
    cannot be read, with the reason; a text says why that is unknown. `helper` is a text if
    registries.conf cannot be read. `namespace` is None for root's
    podman, a text says why a user's cannot be entered."""

    podman: tuple[int, int] | None
    conf: StorageConf | str
    present: Collection[str]
    fuse: bool
    overlay_failure: str | None
    overlay_tried: bool
    unserved: Sequence[tuple[str, str]] | str
    helper: Helper | str
    namespace: Namespace | str | None = None


def examine(facts: Facts, image_store: Path, layer_store: Path) -> list[Finding]:
    """All that is to be said, in the order in which it is to be mended."""
    findings = [_judge_version(facts.podman)]
    if facts.namespace is not None:
        findings.append(_judge_namespace(facts.namespace))
    if isinstance(facts.conf, str):
        findings.append(problem("storage.conf", facts.conf, "repair it; podman needs it, too"))
        findings += [
            skipped(check, "storage.conf cannot be read")
            for check in ("stores", "image-store", "layer-store", "credentials", "overlayfs")
        ]
    else:
        conf = facts.conf
        findings += _judge_conf(conf, of_user=facts.namespace is not None)
        findings += _judge_present(conf, facts.present, image_store, layer_store)
        findings.append(_judge_image_store(conf, image_store))
        findings.append(_judge_layer_store(conf, layer_store, facts.podman))
        findings.append(
            _judge_helper(
                facts.helper, facts.podman, used=f"{layer_store}:ref" in conf.layer_stores
            )
        )
        findings.append(
            judge_overlay(conf.graph_root, facts.overlay_failure, tried=facts.overlay_tried)
        )
    findings.append(judge_fuse(usable=facts.fuse))
    findings += _judge_images(facts.unserved)
    return findings


def _start() -> str:
    return f"start the daemon: {rootless.how_to_start()}"


def _judge_version(version: tuple[int, int] | None) -> Finding:
    check = "podman"
    if version is None:
        return problem(check, "there is no podman", "install podman 3.3 or later")
    if version < ASKS_FOR_BLOBS:
        doors = "the image store alone: it knows no layer stores"
    elif version < ASKS_FOR_TABLES:
        doors = "the image store, and the layer store for any image"
    elif version < FORGETS_LAYERS:
        doors = "the image store, and the layer store for images with tables of contents"
    else:
        doors = "the image store alone: it forgets what it gets from a layer store"
    return ok(check, f"version {version[0]}.{version[1]} can use {doors}")


def _judge_namespace(namespace: Namespace | str) -> Finding:
    """Can a user's podman and daemon see the same mounts?"""
    check = "rootless"
    if isinstance(namespace, str):
        return problem(check, namespace, "podman info has to work without root first")
    if not namespace.opens_fuse:
        return problem(
            check, "users may not open /dev/fuse", "chmod 666 /dev/fuse, as udev does it"
        )
    if namespace.shared is False:
        return problem(
            check,
            "podman has a new namespace, and does not see what the daemon mounts",
            "firstbyte daemon --replace, or systemctl --user restart firstbyte",
        )
    if namespace.ids == 1:
        return warning(
            check,
            "there is one user ID: files of others in images are nobody's",
            "usermod --add-subuids and --add-subgids, then podman system migrate",
        )
    return ok(check, f"podman has {namespace.ids} user IDs; the daemon serves images in mode fuse")


def _judge_conf(conf: StorageConf, *, of_user: bool) -> list[Finding]:
    check = "storage.conf"
    if conf.path is None:
        return [
            problem(
                check,
                "there is none: podman looks into no store but its own",
                f"make {'~/.config' if of_user else '/etc'}/containers/storage.conf, as in "
                "docs/podman.md",
            )
        ]
    if conf.driver not in ("", "overlay"):
        return [
            problem(
                check,
                f"{conf.path} has the driver {conf.driver}",
                'the stores work with overlay alone: driver = "overlay"',
            )
        ]
    if of_user and not conf.driver:
        return [
            problem(
                check,
                f"{conf.path} names no driver, and podman may take vfs without root",
                'the stores work with overlay alone: driver = "overlay"',
            )
        ]
    return [ok(check, f"{conf.path}, graph root {conf.graph_root}")]


def _judge_present(
    conf: StorageConf, present: Collection[str], image_store: Path, layer_store: Path
) -> list[Finding]:
    """A store that is missing keeps podman from doing anything at all."""
    check = "stores"
    missing = [path for path in conf.stores if path not in present]
    if not missing:
        return [ok(check, f"{len(conf.stores)} stores are named, and all are there")]
    ours = (str(image_store), str(layer_store))
    return [
        problem(
            check,
            f"{path} does not exist: no podman command works",
            _start() if path in ours else f"mkdir -p {path}, or take it out of {conf.path}",
        )
        for path in missing
    ]


def _judge_image_store(conf: StorageConf, image_store: Path) -> Finding:
    check = "image-store"
    if str(image_store) in conf.image_stores:
        return ok(check, f"podman reads {image_store}")
    stores = ", ".join(f'"{path}"' for path in (*conf.image_stores, image_store))
    return problem(
        check,
        f"podman does not read {image_store}: it runs no image of firstbyte podman add",
        f"in storage.conf:\n[storage.options]\nadditionalimagestores = [{stores}]",
    )


def _judge_layer_store(
    conf: StorageConf, layer_store: Path, version: tuple[int, int] | None
) -> Finding:
    check = "layer-store"
    entry = f"{layer_store}:ref"
    forgets = version is not None and version >= FORGETS_LAYERS
    if str(layer_store) in conf.layer_stores:
        return problem(
            check,
            f"{layer_store} is named without :ref, which says which image a layer is of",
            f'in storage.conf:\n[storage.options]\nadditionallayerstores = ["{entry}"]',
        )
    if entry not in conf.layer_stores:
        return ok(check, "not used: podman pull downloads all of an image")
    if forgets:
        return warning(
            check,
            f"{layer_store} is named, but this podman gets nothing from it",
            "from 5.4 on podman forgets such layers: take it out, and use the image store",
        )
    return ok(check, f"podman reads {layer_store}")


def _judge_helper(helper: Helper | str, version: tuple[int, int] | None, *, used: bool) -> Finding:
    """Do we get the credentials that are given to one command of podman's alone?"""
    check = "credentials"
    if isinstance(helper, str):
        return problem(check, helper, "repair it; podman needs it, too")
    ours = (
        f'in registries.conf, first of all:\nadditional-layer-store-auth-helper = "{helper.ours}"'
    )
    if helper.named and not helper.runs:
        return problem(check, f"podman cannot run {helper.named} and warns at each pull", ours)
    if version is None or not HANDS_CREDENTIALS <= version < FORGETS_LAYERS or not used:
        return ok(check, "those of podman login are found")
    if not helper.named:
        return warning(
            check,
            "podman does not hand over those of --creds and --authfile: such images are pulled "
            "as ever",
            ours,
        )
    return ok(check, f"podman hands them to {helper.named}")


def _judge_images(unserved: Sequence[tuple[str, str]] | str) -> list[Finding]:
    check = "images"
    if isinstance(unserved, str):
        return [problem(check, unserved, _start())]
    if not unserved:
        return [ok(check, "what is in the image store can be run")]
    return [
        problem(check, f"{name} cannot be run: {reason}", f"try: firstbyte podman add {name}")
        for name, reason in unserved[:_SHOWN]
    ]
