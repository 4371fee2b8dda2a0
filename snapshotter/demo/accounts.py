"""Who a container runs as: the image's "User", looked up in the image's own account files.

Source: image-spec config.md, "User": `user`, `uid`, `user:group`, `uid:gid`, and mixtures.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from snapshotter.demo.errors import DemoError

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True)
class Account:
    """Numbers and the home directory; `groups` are the supplementary ones."""

    uid: int
    gid: int
    groups: tuple[int, ...]
    home: str


def find_user(root: Path, text: str) -> Account:
    """The account that `text` names in the tree at `root`; raises DemoError if there is none.

    A number needs no entry in the files, and the empty text is root.
    """
    user, _, group = text.partition(":")
    user = user or "0"
    users, groups = _entries(root, "etc/passwd", 7), _entries(root, "etc/group", 4)
    entry = next((entry for entry in users if user in (entry[0], entry[2])), None)
    if entry is None and not user.isdecimal():
        raise DemoError(f"the image runs as {user!r}, whom its /etc/passwd does not know")
    name, uid, home = (entry[0], int(entry[2]), entry[5]) if entry else ("", int(user), "/")
    if group:
        return Account(uid, _gid(groups, group), (), home)
    members = (int(entry[2]) for entry in groups if name and name in entry[3].split(","))
    return Account(uid, int(entry[3]) if entry else 0, tuple(members), home)


def _gid(groups: list[list[str]], name: str) -> int:
    entry = next((entry for entry in groups if name in (entry[0], entry[2])), None)
    if entry is None and not name.isdecimal():
        raise DemoError(f"the image runs in the group {name!r}, which its /etc/group does not know")
    return int(entry[2]) if entry else int(name)


def _entries(root: Path, name: str, fields: int) -> list[list[str]]:
    """The lines of passwd(5) or group(5) that have all fields, numbers being numbers."""
    path = root / name
    if path.is_symlink() or not path.is_file():
        return []  # none, or a link, which would be followed in this machine's tree
    lines = (line.split(":") for line in path.read_text(errors="replace").splitlines())
    return [
        line
        for line in lines
        if len(line) == fields and line[2].isdecimal() and (fields < 7 or line[3].isdecimal())
    ]
