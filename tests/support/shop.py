"""A registry with images that tests make up, in the test's process and yet apart from its code."""

from __future__ import annotations

import gzip
import json
import re
import shutil
import subprocess
import tempfile
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Literal

import trio
import zstandard

from snapshotter.registry.chain import chain_ids
from tests.support.faults import OCI_MANIFEST, FaultRegistry, fault_registry
from tests.support.instance import firstbyte
from tests.support.layouts import raw_digest
from tests.support.rootfs import as_layer, make_rootfs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from tests.support.containerd import RunningContainerd
    from tests.support.faults import Recorded

Compression = Literal["gzip", "zstd", "none"]

_LAYER = "application/vnd.oci.image.layer.v1.tar"
_CONFIG = "application/vnd.oci.image.config.v1+json"
_SUFFIXES = {"gzip": "+gzip", "zstd": "+zstd", "none": ""}

_TOOLS = (
    *("chmod", "chown", "cp", "dd", "ln", "mkdir", "mkfifo", "mknod", "mv", "rm", "rmdir"),
    *("setfattr", "stat", "truncate", "wc"),
)
_LIBRARY = re.compile(r"(/\S+) \(0x")


@cache
def workshop() -> bytes:
    """A layer with a shell and what is needed to change files in every way."""
    with tempfile.TemporaryDirectory() as name:
        root = make_rootfs(Path(name) / "root")
        for tool in _TOOLS:
            path = shutil.which(tool)
            assert path
            shutil.copy(path, root / "bin" / tool)
            listed = subprocess.run(["ldd", path], capture_output=True, text=True, check=True)
            for library in _LIBRARY.findall(listed.stdout):
                copy = root / library[1:]
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(library, copy)
        return as_layer(root)


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer as a registry has it."""

    blob: bytes
    diff_id: str
    media_type: str


@cache
def packed(raw: bytes, compression: Compression = "gzip") -> Layer:
    """An uncompressed layer, compressed."""
    pack = {
        "gzip": lambda: gzip.compress(raw, 6, mtime=0),
        "zstd": lambda: zstandard.ZstdCompressor(level=3).compress(raw),
        "none": lambda: raw,
    }
    return Layer(pack[compression](), raw_digest([raw]), _LAYER + _SUFFIXES[compression])


@dataclass(frozen=True, slots=True)
class PushedImage:
    """An image in a registry. `layers` are digests of blobs, `chains` chain IDs, lowest first."""

    reference: str
    digest: str
    layers: tuple[str, ...]
    chains: tuple[str, ...]


class Shop:
    """A registry with images, which tells containerd's requests from ours."""

    def __init__(self, registry: FaultRegistry) -> None:
        self.registry = registry
        self._indexed: set[str] = set()

    def put(
        self,
        name: str,
        layers: Sequence[Layer | bytes],
        *,
        index: bool = False,
    ) -> PushedImage:
        """Put an image in, whose uncompressed layers become gzip; again, if it is there already.

        With `index`, its file index is attached to it.
        """
        found = [layer if isinstance(layer, Layer) else packed(layer) for layer in layers]
        document = {
            "architecture": "amd64",
            "os": "linux",
            "config": {"Cmd": ["/bin/sleep", "infinity"], "Env": ["PATH=/bin"]},
            "rootfs": {"type": "layers", "diff_ids": [layer.diff_id for layer in found]},
        }

        def describe(data: bytes, media_type: str) -> dict[str, object]:
            digest = self.registry.add_blob(data)
            return {"mediaType": media_type, "digest": digest, "size": len(data)}

        manifest = {
            "schemaVersion": 2,
            "mediaType": OCI_MANIFEST,
            "config": describe(json.dumps(document).encode(), _CONFIG),
            "layers": [describe(layer.blob, layer.media_type) for layer in found],
        }
        digest = self.registry.add_manifest(name, manifest, "latest")
        if index and digest not in self._indexed:
            firstbyte("index", "build", "--push", self.reference(name))
            self._indexed.add(digest)
        return self.image(name)

    def reference(self, name: str) -> str:
        return f"{self.registry.host}/{name}:latest"

    def image(self, name: str) -> PushedImage:
        """An image that is there."""
        raw = self.registry.manifests[name, "latest"][1]
        manifest = json.loads(raw)
        config = json.loads(self.registry.blobs[manifest["config"]["digest"]])
        return PushedImage(
            reference=self.reference(name),
            digest=raw_digest([raw]),
            layers=tuple(layer["digest"] for layer in manifest["layers"]),
            chains=tuple(chain_ids(config["rootfs"]["diff_ids"])),
        )

    def let_in(self, containerd: RunningContainerd) -> None:
        """Tell a node that this registry has no TLS."""
        if containerd.version == "2.1":  # 1.6 finds that out, and wants no file that says just it
            directory = containerd.hosts / self.registry.host
            directory.mkdir()
            (directory / "hosts.toml").write_text(f'server = "http://{self.registry.host}"\n')

    def index_blob(self, image: PushedImage) -> str:
        """The digest of the file index that was attached to an image."""
        documents = [json.loads(raw) for _, raw in self.registry.manifests.values()]
        (found,) = {
            document["layers"][0]["digest"]
            for document in documents
            if document.get("subject", {}).get("digest") == image.digest
        }
        assert isinstance(found, str)
        return found

    def forget_requests(self) -> None:
        self.registry.requests.clear()

    def asked_by_us(self) -> list[Recorded]:
        """Requests of the daemon, and of the command line, since they were forgotten."""
        return [request for request in self.registry.asked() if _is_ours(request)]

    def asked_by_containerd(self) -> list[Recorded]:
        return [request for request in self.registry.asked() if not _is_ours(request)]


def _is_ours(request: Recorded) -> bool:
    return request.headers.get("user-agent", "").startswith("firstbyte/")


@contextmanager
def shop() -> Iterator[Shop]:
    """A registry that answers for as long as the block runs, in a thread of its own."""
    started: SimpleQueue[tuple[FaultRegistry, Callable[[], None]]] = SimpleQueue()

    async def serve() -> None:
        async with fault_registry() as registry:
            token, ended = trio.lowlevel.current_trio_token(), trio.Event()
            started.put((registry, lambda: token.run_sync_soon(ended.set)))
            await ended.wait()

    thread = threading.Thread(target=trio.run, args=(serve,), name="registry")
    thread.start()
    registry, end = started.get(timeout=10)
    try:
        yield Shop(registry)
    finally:
        end()
        thread.join(timeout=10)
