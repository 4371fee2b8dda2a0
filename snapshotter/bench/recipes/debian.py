"""Root file systems of Debian as tars, and layers as the differences between two of them.

Source: mmdebstrap(1); image-spec's layer.md for whiteouts.
"""

from __future__ import annotations

import hashlib
import tarfile
from typing import TYPE_CHECKING, NamedTuple

from snapshotter.demo.layout import MADE_MTIME, MadeFile, PackedFile

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from snapshotter.demo.layout import Member
    from snapshotter.demo.workspace import Workspace

SUITE = "bookworm"
_SECONDS = 1800.0
_PIECE = 1 << 20

# Those of directories are the build's, which is clamped to this too; packages' own are older.
EPOCH = MADE_MTIME


def write_root(workspace: Workspace, packages: Sequence[str], target: Path) -> None:
    """Install Debian with these packages, and pack it. The same packages give the same bytes.

    Takes 20 s and more. Raises DemoError.
    """
    command = ["mmdebstrap", "--quiet", "--mode=root", "--variant=minbase", "--skip=output/dev"]
    command += ['--aptopt=Acquire::Check-Valid-Until "false"', '--aptopt=Acquire::Retries "3"']
    if packages:
        command.append(f"--include={','.join(packages)}")
    workspace.run(
        [*command, SUITE, target], seconds=_SECONDS, environment={"SOURCE_DATE_EPOCH": str(EPOCH)}
    )


class _Content(NamedTuple):
    """What makes an entry equal to another one of the same name."""

    kind: bytes
    mode: int
    owner: tuple[int, int]
    mtime: float
    link: str
    digest: bytes


def difference(lower: Path | None, upper: Path) -> list[Member]:
    """The entries of the tar `upper` that `lower` has not, or has otherwise; whiteouts for those
    that it lacks, before the others."""
    below = dict(_contents(lower)) if lower else {}
    members: list[Member] = []
    with tarfile.open(upper, "r:") as tar:
        for header in tar:
            name = _name(header)
            if not name:
                continue
            content = _content(tar, header)
            if below.pop(name, None) != content:
                header.name = name
                header.uname = header.gname = ""
                header.pax_headers = {}
                if header.islnk():
                    header.linkname = header.linkname.removeprefix("./")
                members.append(PackedFile(header, upper))
    return [*_whiteouts(below), *members]


def _contents(path: Path) -> Iterator[tuple[str, _Content]]:
    with tarfile.open(path, "r:") as tar:
        for header in tar:
            if name := _name(header):
                yield name, _content(tar, header)


def _content(tar: tarfile.TarFile, header: tarfile.TarInfo) -> _Content:
    hasher = hashlib.sha256()
    if header.isreg():
        file = tar.extractfile(header)
        assert file
        while piece := file.read(_PIECE):
            hasher.update(piece)
    owner = header.uid, header.gid
    return _Content(header.type, header.mode, owner, header.mtime, header.linkname, hasher.digest())


def _whiteouts(names: dict[str, _Content]) -> Iterator[Member]:
    for name in sorted(names):
        parent, _, last = name.rpartition("/")
        if parent in names:
            continue  # its whiteout is enough
        header = tarfile.TarInfo(f"{parent}/.wh.{last}".lstrip("/"))
        header.mtime = EPOCH
        yield MadeFile(header)


def _name(header: tarfile.TarInfo) -> str:
    """Without the leading dot; empty for the root itself."""
    return header.name.removeprefix(".").strip("/")
