"""The demo: one image, started lazily and by a full pull, side by side."""

from __future__ import annotations

import os
import shutil
import socket
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from snapshotter.demo import image as sample_image
from snapshotter.demo.baseline import Containerd
from snapshotter.demo.container import Container
from snapshotter.demo.errors import DemoError
from snapshotter.demo.interruption import Interruption
from snapshotter.demo.lazy import LazyMount
from snapshotter.demo.ready import HttpProbe, Probe, wait_ready
from snapshotter.demo.registry import LocalRegistry
from snapshotter.demo.timeline import FullPull, Lazy, Timeline
from snapshotter.demo.workspace import Workspace
from snapshotter.registry.manifest import Manifest, parse, parse_config
from snapshotter.registry.reference import DEFAULT_TAG, Reference

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from snapshotter.demo.progress import Narrator
    from snapshotter.registry.manifest import ImageConfig

_PROGRAMS = ("docker-registry", "skopeo", "runc", "containerd", "ctr")
_DROP_CACHES = Path("/proc/sys/vm/drop_caches")
_INSPECT_SECONDS = 30.0
_LOCAL_SECONDS = 3600.0
_POLL_SECONDS = 0.2
_SAMPLE_PAGE = "/?q=C"


@dataclass(frozen=True)
class Workload:
    """What to start. `image` is a reference, oci:PATH:TAG, or None for the sample image.

    `probe` makes a new probe for each start; `seconds` is how long one may take to get ready.
    """

    image: str | None
    probe: Callable[[], Probe]
    environment: dict[str, str]
    seconds: float


def sample_workload(seconds: float) -> Workload:
    """The sample image, ready when its web application answers."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    return Workload(None, lambda: HttpProbe(port, _SAMPLE_PAGE), {"PORT": str(port)}, seconds)


def run_demo(workload: Workload, narrator: Narrator) -> Timeline:
    """Run all of it; when this returns or raises, everything it made is gone.

    For the main thread. Raises DemoError and other FirstByteErrors, or InterruptedBySignal.
    """
    _check_machine()
    with Interruption() as interruption, Workspace(interruption, narrator.say) as workspace:
        try:
            return _Demo(workload, narrator, workspace).run()
        finally:
            narrator.say("* clean up")


def _check_machine() -> None:
    if os.geteuid():
        raise DemoError("the demo mounts file systems and runs containers", hint="run it as root")
    if missing := [program for program in _PROGRAMS if not shutil.which(program)]:
        raise DemoError(f"not installed: {', '.join(missing)}", hint="'make demo' installs them")


class _Demo:
    def __init__(self, workload: Workload, narrator: Narrator, workspace: Workspace) -> None:
        self._workload = workload
        self._narrator = narrator
        self._workspace = workspace
        self._interruption = workspace.interruption

    def run(self) -> Timeline:
        with self._narrator.step("start a registry on loopback"):
            registry = LocalRegistry(self._workspace)
        reference = self._publish(registry)
        manifest, config = self._inspect(reference)
        lazy = self._start_lazily(registry, reference, config)
        full = self._start_after_pull(reference, config)
        return Timeline(
            image=self._workload.image or "sample image",
            layers=len(manifest.layers),
            image_bytes=sum(layer.size for layer in manifest.layers),
            lazy=lazy,
            full_pull=full,
        )

    def _publish(self, registry: LocalRegistry) -> str:
        """The reference of the image, which is in the local registry afterwards."""
        if self._workload.image is not None:
            with self._narrator.step(f"copy {self._workload.image} into it"):
                return registry.copy_in(self._workload.image, _local_name(self._workload.image))
        layout = self._workspace.path / "layout"
        with self._narrator.step("make the sample image from this machine's packages") as step:
            layers = sample_image.build(layout, self._interruption.check)
            size, raw = sum(x.size for x in layers), sum(x.raw_size for x in layers)
            step.detail = (
                f"{len(layers)} layers, {raw / 1e6:.0f} MB unpacked, {size / 1e6:.0f} MB compressed"
            )
        with self._narrator.step("push it, as any tool would"):
            return registry.copy_in(f"oci:{layout}:{sample_image.TAG}", "sample:latest")

    def _inspect(self, reference: str) -> tuple[Manifest, ImageConfig]:
        def inspect(*options: str) -> bytes:
            command = ["skopeo", "inspect", "--raw", "--tls-verify=false", *options]
            command.append(f"docker://{reference}")
            return self._workspace.run(command, seconds=_INSPECT_SECONDS).encode()

        manifest = parse(inspect(), "", reference)
        assert isinstance(manifest, Manifest)  # skopeo copied one image
        return manifest, parse_config(inspect("--config"), reference)

    def _start_lazily(self, registry: LocalRegistry, reference: str, config: ImageConfig) -> Lazy:
        lazy = LazyMount(self._workspace, reference)
        with self._narrator.step("build the file index, and push it beside the image"):
            lazy.build_index()
        self._drop_caches()
        before, started = registry.traffic(), time.monotonic()
        with self._narrator.step("mount the image, of which nothing is here yet"):
            lazy.mount()
        mounted = time.monotonic() - started
        with self._container("lazy-start", lazy.directory, config):
            ready = time.monotonic() - started
            traffic = registry.traffic() - before
            local = self._wait_local(lazy, started)
        lazy.unmount()
        return Lazy(
            mounted_seconds=mounted,
            ready_seconds=ready,
            fetched_bytes=traffic.sent_bytes,
            requests=traffic.requests,
            local_seconds=local,
        )

    def _wait_local(self, lazy: LazyMount, started: float) -> float:
        with self._narrator.step("wait until the rest has come in the background") as step:
            while time.monotonic() - started < _LOCAL_SECONDS:
                local, total = lazy.local_bytes()
                if local == total:
                    return time.monotonic() - started
                step.detail = f"{local / 1e6:.0f} of {total / 1e6:.0f} MB"
                self._interruption.sleep(_POLL_SECONDS)
        raise DemoError(f"the image was not local within {_LOCAL_SECONDS:.0f} s")

    def _start_after_pull(self, reference: str, config: ImageConfig) -> FullPull:
        with self._narrator.step("start a containerd, to compare with"):
            containerd = Containerd(self._workspace)
        directory = self._workspace.directory("full")
        self._drop_caches()
        started = time.monotonic()
        with self._narrator.step("pull all of the image and unpack it"):
            containerd.pull(reference)
        pulled = time.monotonic() - started
        containerd.mount(reference, directory)
        with self._container("full-start", directory, config):
            ready = time.monotonic() - started
        return FullPull(pulled_seconds=pulled, ready_seconds=ready)

    @contextmanager
    def _container(self, name: str, root: Path, config: ImageConfig) -> Iterator[None]:
        """Start the image's workload on `root`; the block begins when it is ready."""
        container = Container(self._workspace, name, root)
        probe = self._workload.probe()
        with self._narrator.step(f"start a container: ready when {probe.description}"):
            container.start(config.run, self._workload.environment)
            wait_ready(probe, container, self._interruption, self._workload.seconds)
        yield
        with self._narrator.step("stop the container"):
            container.stop()

    def _drop_caches(self) -> None:
        """So that nothing of the image comes from memory, in either start."""
        os.sync()
        try:
            _DROP_CACHES.write_text("3")
        except OSError as error:
            self._narrator.say(f"  the page cache stays as it is: {error.strerror}")


def _local_name(image: str) -> str:
    """Repository and tag in the local registry, to be recognised by."""
    if image.startswith("oci:"):
        return f"image:{DEFAULT_TAG}"
    reference = Reference.parse(image)
    return f"{reference.repository}:{reference.tag or DEFAULT_TAG}"
