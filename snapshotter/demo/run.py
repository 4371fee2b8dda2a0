"""The demo: one image, started lazily and by a full pull, side by side."""

from __future__ import annotations

import os
import shutil
import socket
import time
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from snapshotter.demo import image as sample_image
from snapshotter.demo.errors import DemoError
from snapshotter.demo.interruption import Interruption
from snapshotter.demo.lazy import Node, build_index
from snapshotter.demo.link import Link
from snapshotter.demo.ready import HttpProbe, Probe, wait_ready
from snapshotter.demo.registry import LocalRegistry
from snapshotter.demo.timeline import FullPull, Lazy, Timeline
from snapshotter.demo.ways import LazyMount, PodmanRun, Pull, Runtime, UnpackedMount, Way
from snapshotter.demo.workspace import Workspace
from snapshotter.registry.manifest import Manifest, parse, parse_config
from snapshotter.registry.reference import DEFAULT_TAG, LAYOUT_PREFIX, Reference

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from snapshotter.demo.progress import Narrator
    from snapshotter.registry.manifest import ImageConfig

_PROGRAMS = ("docker-registry", "skopeo", "runc", "containerd", "ctr")
_PROGRAMS_OF_PODMAN = ("docker-registry", "skopeo", "runc", "podman")
_DROP_CACHES = Path("/proc/sys/vm/drop_caches")
_INSPECT_SECONDS = 30.0
_LOCAL_SECONDS = 3600.0
_POLL_SECONDS = 0.2
_SAMPLE_PAGE = "/?q=C"


@dataclass(frozen=True)
class Workload:
    """What to start, and what starts it. `image` is a reference, oci:PATH:TAG, or None for the
    sample image.

    `probe` makes a new probe for each start; `seconds` is how long one may take to get ready.
    Both starts get their bytes over a link of `link_mbit` Mbit/s.
    """

    image: str | None
    probe: Callable[[], Probe]
    environment: Mapping[str, str]
    seconds: float
    link_mbit: float
    runtime: Runtime


def sample_workload(seconds: float, link_mbit: float, runtime: Runtime) -> Workload:
    """The sample image, ready when its web application answers."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = {"PORT": str(port)}
    probe = partial(HttpProbe, port, _SAMPLE_PAGE)
    return Workload(None, probe, environment, seconds, link_mbit, runtime)


def run_demo(workload: Workload, narrator: Narrator) -> Timeline:
    """Run all of it; when this returns or raises, everything it made is gone.

    For the main thread. Raises DemoError and other FirstByteErrors, or InterruptedBySignal.
    """
    check_machine(workload.runtime)
    with Interruption() as interruption, Workspace(interruption, narrator.say) as workspace:
        try:
            return _Demo(workload, narrator, workspace).run()
        except Exception:
            interruption.check()  # the same Ctrl-C may have ended what has failed
            raise
        finally:
            narrator.say("* clean up")


def check_machine(runtime: Runtime = "runc") -> None:
    """Raise DemoError if this machine or this user cannot run what the demo runs."""
    if os.geteuid():
        raise DemoError("this mounts file systems and runs containers", hint="run it as root")
    programs = _PROGRAMS if runtime != "podman" else _PROGRAMS_OF_PODMAN
    if missing := [program for program in programs if not shutil.which(program)]:
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
            link = Link(registry.host, self._workload.link_mbit * 1e6 / 8)
            self._workspace.defer("stop the link", link.stop)
        name = self._publish(registry)
        near, far = f"{registry.host}/{name}", f"{link.host}/{name}"
        with self._narrator.step("build the file index, and push it beside the image"):
            build_index(self._workspace, near)
        manifest, config = self._inspect(near)
        return Timeline(
            image=self._workload.image or "sample image",
            runtime=self._workload.runtime,
            link_mbit=self._workload.link_mbit,
            layers=len(manifest.layers),
            image_bytes=sum(layer.size for layer in manifest.layers),
            lazy=self._start_lazily(registry, link, far, config),
            full_pull=self._start_after_pull(far, config),
        )

    def _publish(self, registry: LocalRegistry) -> str:
        """The name of the image, which is in the local registry afterwards."""
        if self._workload.image is not None:
            name = _local_name(self._workload.image)
            with self._narrator.step(f"copy {self._workload.image} into it"):
                registry.copy_in(self._workload.image, name)
            return name
        layout, name = self._workspace.path / "layout", f"sample:{DEFAULT_TAG}"
        with self._narrator.step("make the sample image from this machine's packages") as step:
            layers = sample_image.build(layout, self._interruption.check)
            raw = sum(layer.raw_size for layer in layers)
            step.detail = f"{len(layers)} layers, {raw / 1e6:.0f} MB unpacked"
        with self._narrator.step("push it, as any tool would"):
            registry.copy_in(f"{LAYOUT_PREFIX}{layout}:{sample_image.TAG}", name)
        return name

    def _inspect(self, reference: str) -> tuple[Manifest, ImageConfig]:
        def inspect(*options: str) -> bytes:
            command = ["skopeo", "inspect", "--raw", "--tls-verify=false", *options]
            command.append(f"docker://{reference}")
            return self._workspace.run(command, seconds=_INSPECT_SECONDS).encode()

        manifest = parse(inspect(), "", reference)
        assert isinstance(manifest, Manifest)  # skopeo copied one image
        return manifest, parse_config(inspect("--config"), reference)

    def _start_lazily(
        self, registry: LocalRegistry, link: Link, reference: str, config: ImageConfig
    ) -> Lazy:
        with self._narrator.step("start a daemon with an empty store"):
            node = Node(self._workspace)
        way: Way
        if self._workload.runtime == "runc":
            what, way = "mount the image", LazyMount(self._workspace, node, reference, config.run)
        elif self._workload.runtime == "podman":
            what = "add the image to podman's image store"
            way = PodmanRun(self._workspace, "podman-lazy", reference, node)
        else:
            with self._narrator.step("start a containerd that has the daemon as its snapshotter"):
                way = Pull(self._workspace, "containerd-lazy", reference, node)
            what = "pull the image: its layers stay where they are"
        self._drop_caches()
        carried, answered, started = link.carried, registry.answered(), time.monotonic()
        with self._narrator.step(what):
            way.provide()
        provided = time.monotonic() - started
        with self._container(way):
            ready = time.monotonic() - started
            carried, answered = link.carried - carried, registry.answered() - answered
            needed = node.needed_bytes()
            local = self._wait_local(node, started)
        way.close()
        node.stop()
        return Lazy(
            mounted_seconds=provided if self._workload.runtime == "runc" else None,
            added_seconds=provided if self._workload.runtime == "podman" else None,
            pulled_seconds=provided if self._workload.runtime == "containerd" else None,
            ready_seconds=ready,
            needed_bytes=needed,
            fetched_bytes=carried,
            requests=answered,
            local_seconds=local,
        )

    def _wait_local(self, node: Node, started: float) -> float:
        with self._narrator.step("wait until the rest has come in the background") as step:
            while time.monotonic() - started < _LOCAL_SECONDS:
                local, total = node.local()
                if local == total:
                    return time.monotonic() - started
                step.detail = f"{local / 1e6:.0f} of {total / 1e6:.0f} MB"
                self._interruption.sleep(_POLL_SECONDS)
        raise DemoError(f"the image was not local within {_LOCAL_SECONDS:.0f} s")

    def _start_after_pull(self, reference: str, config: ImageConfig) -> FullPull:
        way: Way
        if self._workload.runtime == "podman":
            way = PodmanRun(self._workspace, "podman-full", reference, None)
        else:
            with self._narrator.step("start a containerd, to compare with"):
                way = (
                    UnpackedMount(self._workspace, reference, config.run)
                    if self._workload.runtime == "runc"
                    else Pull(self._workspace, "containerd-full", reference, None)
                )
        self._drop_caches()
        started = time.monotonic()
        with self._narrator.step("pull all of the image and unpack it"):
            way.provide()
        pulled = time.monotonic() - started
        with self._container(way):
            ready = time.monotonic() - started
        return FullPull(pulled_seconds=pulled, ready_seconds=ready)

    @contextmanager
    def _container(self, way: Way) -> Iterator[None]:
        """Start the image's workload; the block begins when it is ready."""
        probe = self._workload.probe()
        with self._narrator.step(f"start a container: ready when {probe.description}"):
            container = way.start(self._workload.environment)
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
    if image.startswith(LAYOUT_PREFIX):
        return f"image:{DEFAULT_TAG}"
    reference = Reference.parse(image)
    return f"{reference.repository}:{reference.tag or DEFAULT_TAG}"
