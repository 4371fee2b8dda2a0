"""Images that share layers in several ways, in a registry, with file indexes.

Every image has the tools of a shell at the bottom. What is above comes in two orders, so that equal
layers are at different depths, of different chains. One file of a shared layer is replaced by each
image's own.
"""

from __future__ import annotations

import hashlib
import io
import json
import random
import re
import shutil
import subprocess
import tarfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tests.support.instance import firstbyte
from tests.support.layouts import write_layout
from tests.support.registry import skopeo_push
from tests.support.rootfs import as_layer, make_rootfs

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from tests.support.registry import RunningRegistry

_GROUPS = 2
_AT_ONCE = 2  # file indexes being built
_LIBRARY = re.compile(r"(/\S+) \(0x")


@dataclass(frozen=True)
class SharingImage:
    """An image in a registry.

    `repository` has it under the tag "latest"; `digest` is its manifest's. `files` are digests by
    path of what a container should read; `blobs` the compressed sizes of its layers by digest.
    """

    repository: str
    digest: str
    files: dict[str, str]
    blobs: dict[str, int]

    @property
    def command(self) -> tuple[str, ...]:
        """What a container runs to read all of `files`."""
        return ("sha256sum", *self.files)

    @property
    def printed(self) -> str:
        """What the command prints if all is right."""
        return "".join(f"{digest}  {path}\n" for path, digest in self.files.items())


def push_many_images(
    registry: RunningRegistry, directory: Path, count: int = 10
) -> list[SharingImage]:
    """Make them in `directory`, and push them and a file index for each."""
    bottom = _tools(directory / "tools")
    common = _files("common", {"large": 1_500_000, "small": 700, "replaced": 30_000})
    groups = [_files(f"group{number}", {"data": 900_000}) for number in range(_GROUPS)]
    made = []
    for number in range(count):
        own = _files(f"own{number}", {"data": 600_000, "empty": 0})
        own["common/replaced"] = _content(f"replaced{number}", 10_000)
        top = _files(f"top{number}", {"config": 3_000})
        group = groups[number % _GROUPS]
        shared = [common, group] if number % 4 < 2 else [group, common]
        made.append(_push(registry, directory, f"sharing/{number}", bottom, [*shared, own, top]))
    with ThreadPoolExecutor(_AT_ONCE) as threads:
        names = [registry.reference(image.repository) for image in made]
        list(threads.map(lambda name: firstbyte("index", "build", "--push", name), names))
    return made


def _push(
    registry: RunningRegistry,
    directory: Path,
    repository: str,
    bottom: bytes,
    layers: Sequence[dict[str, bytes]],
) -> SharingImage:
    merged: dict[str, bytes] = {}
    for layer in layers:
        merged |= layer
    layout = directory / repository.replace("/", "-")
    config = {"config": {"Cmd": ["/bin/sleep", "infinity"], "Env": ["PATH=/bin"]}}
    manifest = write_layout(layout, [bottom, *map(_tar, layers)], config=config)
    skopeo_push(layout, registry.reference(repository))
    described = json.loads(_blob(layout, manifest))["layers"]
    return SharingImage(
        repository=repository,
        digest=manifest,
        files={f"/{path}": hashlib.sha256(data).hexdigest() for path, data in merged.items()},
        blobs={layer["digest"]: layer["size"] for layer in described},
    )


def _blob(layout: Path, digest: str) -> bytes:
    return (layout / "blobs" / digest.replace(":", "/")).read_bytes()


def _tools(root: Path) -> bytes:
    make_rootfs(root)
    program = shutil.which("sha256sum")
    assert program
    listed = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
    for library in _LIBRARY.findall(listed):
        (root / library[1:]).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(library, root / library[1:])
    shutil.copy(program, root / "bin")
    return as_layer(root)


def _files(directory: str, sizes: dict[str, int]) -> dict[str, bytes]:
    return {f"{directory}/{name}": _content(f"{directory}/{name}", n) for name, n in sizes.items()}


def _content(seed: str, size: int) -> bytes:
    """Half of it compresses well, half does not."""
    source = random.Random(seed)
    return source.randbytes(size - size // 2) + b"%032x" % source.getrandbits(128) * (size // 64)


def _tar(files: dict[str, bytes]) -> bytes:
    output = io.BytesIO()
    with tarfile.open(fileobj=output, mode="w") as tar:
        for path, data in files.items():
            entry = tarfile.TarInfo(path)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return output.getvalue()
