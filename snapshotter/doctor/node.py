"""Judges the node: what kernel and file systems can do."""

from __future__ import annotations

from typing import TYPE_CHECKING

from snapshotter.doctor.findings import Finding, ok, problem, skipped
from snapshotter.doctor.versions import KERNEL_FUSE_IDMAP

if TYPE_CHECKING:
    from pathlib import Path

    from snapshotter.doctor.versions import Version


def judge_fuse(*, usable: bool) -> Finding:
    """Is /dev/fuse there?"""
    check = "fuse"
    if usable:
        return ok(check, "/dev/fuse is there")
    return problem(
        check,
        "/dev/fuse is missing",
        "modprobe fuse; in a container, give it the device (--device /dev/fuse)",
    )


def judge_overlay(root: Path, failure: str | None, *, tried: bool) -> Finding:
    """Can an overlayfs have its upper directory on the file system of `root`?"""
    check = "overlayfs"
    if not tried:
        return skipped(check, "only root can mount", "run this as root")
    if failure is None:
        return ok(check, f"works on the file system of {root}")
    return problem(
        check,
        f"does not work on the file system of {root} ({failure})",
        "modprobe overlay; put root on ext4 or xfs (with ftype=1), and on no other overlayfs",
    )


def judge_kernel(version: Version | None) -> Finding:
    """What is this kernel too old for?"""
    check = "kernel"
    if version is None:
        return skipped(check, "its version is unknown")
    if version < KERNEL_FUSE_IDMAP:
        return ok(
            check,
            f"version {version}; pods with user namespaces need {KERNEL_FUSE_IDMAP.major}."
            f"{KERNEL_FUSE_IDMAP.minor}",
        )
    return ok(check, f"version {version}")
