"""The sample image: a small web application on Debian and Python, made from this machine.

Nothing is downloaded: its files are those of installed Debian packages. In size and shape it is
what people run: a base system, a language runtime, tools that came along and that nothing needs at
run time, and on top the application with its data. The same packages give the same bytes.
"""

from __future__ import annotations

import importlib.util
import os
import tarfile
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from snapshotter.demo import sample
from snapshotter.demo.layout import (
    MADE_MTIME,
    HostFile,
    Layer,
    MadeFile,
    Member,
    write_image,
    write_layer,
)
from snapshotter.demo.packages import Packages, files_of
from snapshotter.demo.sample import catalogue
from snapshotter.registry.platform import Platform

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

TAG = "sample"  # of the image in the layout

# Roots of the package layers, lowest first. What they need comes along.
_LAYERS = (
    ("base-files", "base-passwd", "bash", "coreutils", "dash", "findutils", "grep", "sed", "tar"),
    ("python3", "ca-certificates"),
    ("perl",),
    ("binutils", "cpp"),
)
_HOME = "srv/catalogue"
_OWNER = 1000
_USER = f"app:x:{_OWNER}:{_OWNER}:the application:/{_HOME}:/usr/sbin/nologin\n"
_GROUP = f"app:x:{_OWNER}:\n"
_ACCOUNTS = Path("/usr/share/base-passwd")  # the package's own lists, not this machine's users


def build(layout: Path, check: Callable[[], None]) -> tuple[Layer, ...]:
    """Make the image under the tag TAG in an OCI layout at `layout`, and return its layers.

    `check` is called often, also from other threads; what it raises ends the work.
    """
    blobs = layout / "blobs" / "sha256"
    blobs.mkdir(parents=True)
    plans = [*package_layers(Packages.installed(), _LAYERS), list(_application())]

    # zlib lets other threads run, so two processors compress two layers.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = [
            pool.submit(write_layer, blobs, f"layer-{number}", plan, check)
            for number, plan in enumerate(plans)
        ]
        layers = tuple(job.result() for job in jobs)
    platform = Platform.host()
    config = {
        "architecture": platform.architecture,
        "os": platform.os,
        "config": {
            "User": "app",
            "Env": ["PATH=/usr/local/bin:/usr/bin:/bin", "LANG=C.UTF-8", "PORT=8080"],
            "Entrypoint": ["python3", "server.py"],
            "WorkingDir": f"/{_HOME}",
        },
    }
    write_image(layout, TAG, layers, config)
    return layers


def package_layers(packages: Packages, layers: Iterable[Sequence[str]]) -> Iterator[list[Member]]:
    """What goes into each layer: the packages named for it, and what they need that no layer below
    has. The lowest also gets what belongs to no package.
    """
    chosen: list[str] = []
    written: set[str] = set()
    aliases = _aliases()
    for number, roots in enumerate(layers):
        added = packages.closure(roots, without=chosen)
        chosen += added
        members: list[Member] = []
        if number == 0:
            members += [_made(name, tarfile.SYMTYPE, link=link) for name, link in aliases.items()]
            written |= aliases.keys()
        for name in _names(files_of(added), aliases):
            if name not in written:
                written.add(name)
                members.append(HostFile(name, Path("/", name)))
        if number == 0:
            members += _accounts()
        yield members


def _aliases() -> dict[str, str]:
    """`bin` to `usr/bin` and its like: links in / which belong to no package."""
    links = {path.name: str(path.readlink()) for path in Path("/").iterdir() if path.is_symlink()}
    return {name: link for name, link in sorted(links.items()) if link.startswith("usr/")}


def _names(listed: Iterable[str], aliases: dict[str, str]) -> Iterator[str]:
    """Names inside the image for paths as packages list them, each after its directory."""
    for path in listed:
        top, slash, rest = path[1:].partition("/")
        name = f"{aliases[top]}/{rest}" if slash and top in aliases else path[1:]
        if not os.path.lexists(f"/{name}"):
            continue  # this machine leaves out documentation, or its like
        yield name
        if name.endswith(".py"):
            # Compiled when the package was installed, so not in its list; without it, a start
            # would be slower than anybody's.
            compiled = Path(importlib.util.cache_from_source(f"/{name}"))
            if compiled.is_file():
                yield str(compiled.parent)[1:]
                yield str(compiled)[1:]


def _accounts() -> Iterator[Member]:
    for name, addition in (("passwd", _USER), ("group", _GROUP)):
        text = (_ACCOUNTS / f"{name}.master").read_text() + addition
        yield _made(f"etc/{name}", data=text.encode())


def _application() -> Iterator[Member]:
    source = Path(sample.__file__).parent
    yield _made(_HOME, tarfile.DIRTYPE, 0o755, owner=_OWNER)
    for name in ("page.html", "server.py"):
        yield _made(f"{_HOME}/{name}", data=(source / name).read_bytes(), owner=_OWNER)
    with tempfile.TemporaryDirectory() as directory:
        database = Path(directory, "catalogue.db")
        catalogue.write(database)
        yield _made(f"{_HOME}/{database.name}", data=database.read_bytes(), owner=_OWNER)


def _made(
    name: str,
    kind: bytes = tarfile.REGTYPE,
    mode: int = 0o644,
    *,
    link: str = "",
    data: bytes = b"",
    owner: int = 0,
) -> Member:
    header = tarfile.TarInfo(name)
    header.type = kind
    header.mode = 0o777 if kind == tarfile.SYMTYPE else mode
    header.linkname = link
    header.size = len(data)
    header.uid = header.gid = owner
    header.mtime = MADE_MTIME
    return MadeFile(header, data)
