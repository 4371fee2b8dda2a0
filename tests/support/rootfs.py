"""A root file system with a shell and a few tools, copied from this machine."""

from __future__ import annotations

import io
import re
import shutil
import subprocess
import tarfile
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

TOOLS = ("cat", "id", "ls", "pwd", "sh", "sleep", "touch")

_LIBRARY = re.compile(r"(/\S+) \(0x")
_ACCOUNTS = {
    "passwd": "root:x:0:0::/root:/bin/sh\napp:x:1234:77:The App:/home/app:/bin/sh\n",
    "group": "root:x:0:\nteam:x:77:\nextra:x:88:other,app\n",
}


def make_rootfs(root: Path) -> Path:
    """Fill the directory `root`; returns it. `app` is user 1234, in the groups 77 and 88."""
    (root / "bin").mkdir(parents=True)
    for tool in TOOLS:
        path = shutil.which(tool)
        assert path
        shutil.copy(path, root / "bin" / tool)
        listed = subprocess.run(["ldd", path], capture_output=True, text=True, check=True).stdout
        for library in _LIBRARY.findall(listed):
            copy = root / library[1:]
            if not copy.exists():
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(library, copy)
    for name in ("etc", "proc", "sys", "dev", "root", "home/app"):
        (root / name).mkdir(parents=True)
    for name, text in _ACCOUNTS.items():
        (root / "etc" / name).write_text(text)
    return root


def as_layer(root: Path) -> bytes:
    """The tree as an uncompressed tar."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as tar:
        tar.add(root, arcname="")
    return data.getvalue()
