"""Nodes and snapshots for tests of what people do with containerd on lazy images."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
import uuid
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from snapshotter.containerd.labels import REMOTE
from snapshotter.daemon import protocol
from tests.support.debian_root import shared
from tests.support.grpc_clients import SnapshotsClient
from tests.support.instance import WAIT_SECONDS, Instance, instance, wait_until
from tests.support.lazy_images import mounted
from tests.support.lazy_node import SNAPSHOTTER, LazyNode
from tests.support.trees import Item, differences, read_tree

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager

    from snapshotter.containerd.snapshots import Mount
    from tests.support.containerd import RunningContainerd, Version
    from tests.support.shop import PushedImage

Snapshotter = Literal["firstbyte", "overlayfs"]

_BEGAN = time.time_ns()


class ConfiguredInstance(Instance):
    """An instance with a configuration file, whose daemon's log is kept."""

    def command(self, *arguments: str | Path) -> list[str]:
        return [*super().command(*arguments), "--config", str(self.base / "config.toml")]

    def start(self) -> subprocess.Popen[bytes]:
        with (self.base / "daemon.log").open("ab") as log:
            process = subprocess.Popen(
                self.command("daemon"), stdout=subprocess.DEVNULL, stderr=log
            )
        self.started.append(process)
        wait_until(lambda: (self.state / "firstbyte-control.sock").exists() or process.poll())
        return process

    def log(self) -> str:
        return (self.base / "daemon.log").read_text()


@contextmanager
def workload_node(
    run_containerd: Callable[..., AbstractContextManager[RunningContainerd]],
    version: Version,
    config: str = "",
    **fields: object,
) -> Iterator[LazyNode]:
    """A node whose daemon has this configuration; `fields` are more of containerd's `Setup`.

    Both read registries' hosts.toml files from `node.containerd.hosts`.
    """
    with instance() as made, shared(made.base):
        here = ConfiguredInstance(made.base)
        hosts = here.base / "certs.d"
        (here.base / "config.toml").write_text(
            f"{config}\n[registry]\nconfig_path = {json.dumps(str(hosts))}\n"
        )
        try:
            daemon = here.start()
            with run_containerd(
                version,
                snapshotter=SNAPSHOTTER,
                proxy=here.state / "firstbyte.sock",
                proxy_root=here.root,
                binds=(here.base,),
                **fields,
            ) as containerd:
                hosts.symlink_to(containerd.hosts)
                yield LazyNode(containerd, here, daemon)
        finally:
            here.clean()


KEPT = {"containerd.io/gc.root": "of a test"}
"""Labels of a snapshot that containerd does not collect."""

LAZY = "k8s.io"
PLAIN = f"plain-{os.getpid()}"  # names cgroups, too


def usual_namespace(snapshotter: Snapshotter) -> str:
    """The CRI's for ours, as it pulls lazily everywhere; PLAIN for containerd's own."""
    return LAZY if snapshotter == SNAPSHOTTER else PLAIN


def ctr_pull(
    containerd: RunningContainerd,
    image: PushedImage,
    snapshotter: Snapshotter,
    *,
    local: bool = True,
) -> None:
    """`ctr images pull` into the namespace PLAIN; containerd 1.6 knows only the local way."""
    way: tuple[str, ...] = ("--local",) if local and containerd.version == "2.1" else ()
    options = ("--snapshotter", snapshotter, "--hosts-dir", str(containerd.hosts))
    containerd.ctr("images", "pull", *options, *way, image.reference, namespace=PLAIN)


def ctr_run(
    containerd: RunningContainerd,
    image: PushedImage,
    snapshotter: Snapshotter,
    *arguments: str,
    name: str = "",
    namespace: str = "",
) -> str:
    """What a container prints that `ctr run` makes; it must succeed.

    `arguments` are options, and after a "--" the command. A container with a name stays.
    """
    namespace = namespace or usual_namespace(snapshotter)
    split = arguments.index("--")
    after = () if name else ("--rm",)
    try:
        return containerd.ctr(
            *("run", *after, "--snapshotter", snapshotter),
            *("--runc-root", str(containerd.base / "runc"), *arguments[:split]),
            *(image.reference, name or uuid.uuid4().hex, *arguments[split + 1 :]),
            namespace=namespace,
        )
    finally:
        for cgroup in Path("/sys/fs/cgroup").glob(f"*/{namespace}"):
            with suppress(OSError):  # another container is in there
                cgroup.rmdir()


def ctr_diff(containerd: RunningContainerd, snapshotter: Snapshotter, key: str) -> bytes:
    """What has been changed in a container, as containerd makes a layer of it (compressed).

    That is what `nerdctl commit` does, too. `ctr` is the machine's own, because the layer comes
    from its standard output; the work is that of the daemon.
    """
    namespace = usual_namespace(snapshotter)
    done = subprocess.run(
        (
            *("ctr", "--address", containerd.socket, "--namespace", namespace),
            *("snapshots", "--snapshotter", snapshotter, "diff", key),
        ),
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode() + containerd.log()
    return done.stdout


@contextmanager
def reconfigured(containerd: RunningContainerd, before: str, after: str) -> Iterator[None]:
    """Restart containerd with other words in its configuration, for as long as the block runs."""
    path = containerd.base / "config.toml"
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after))
    containerd.restart()
    try:
        yield
    finally:
        path.write_text(text)
        containerd.restart()


class Snapshots(SnapshotsClient):
    """One snapshotter of a containerd. Its snapshots stay until they are removed."""

    def __init__(
        self,
        containerd: RunningContainerd,
        snapshotter: Snapshotter,
        namespace: str = "",
    ) -> None:
        """The namespace, if not given, is the CRI's for ours and PLAIN for containerd's own."""
        usual = usual_namespace(snapshotter)
        super().__init__(containerd.socket, namespace=namespace or usual, snapshotter=snapshotter)
        self._places = containerd.base

    @contextmanager
    def shown(self, mounts: Sequence[Mount]) -> Iterator[Path]:
        """What mounts of a snapshot show."""
        place = self._places / f"shown-{uuid.uuid4().hex}"
        with mounted(mounts, place):
            yield place
        place.rmdir()

    @contextmanager
    def viewed(self, parent: str) -> Iterator[Path]:
        """What a container would see that is made on `parent`."""
        key = f"viewed-{uuid.uuid4().hex}"
        with self.shown(self.view(key, parent, KEPT)) as place:
            yield place
        self.remove(key)

    def tree(self, parent: str) -> dict[bytes, Item]:
        """What is in there."""
        with self.viewed(parent) as place:
            return read_tree(place)

    def build(self, name: str, parent: str, change: Callable[[Path], object]) -> None:
        """Commit a layer with a change on `parent`, as `docker build` does for each step."""
        key = f"building-{uuid.uuid4().hex}"
        with self.shown(self.prepare(key, parent, KEPT)) as place:
            change(place)
        self.commit(name, key, KEPT)

    def lazy_layers(self, image: PushedImage) -> list[bool]:
        """Which layers of an image are served lazily, the lowest first."""
        return [REMOTE in self.stat(chain).labels for chain in image.chains]


def lazy_layers(containerd: RunningContainerd, image: PushedImage) -> list[bool]:
    """`Snapshots.lazy_layers` of an image that CRI has pulled."""
    with Snapshots(containerd, "firstbyte") as snapshots:
        return snapshots.lazy_layers(image)


def tree_differences(found: Mapping[bytes, Item], expected: Mapping[bytes, Item]) -> list[str]:
    """`trees.differences`, but for times that were made up since this began, and the root's.

    Nor does it compare counts of links: overlayfs counts names that upper layers have deleted. The
    names of each inode are compared.
    """
    return differences(_comparable(found), _comparable(expected))


def _comparable(tree: Mapping[bytes, Item]) -> dict[bytes, Item]:
    known = {path for path, item in tree.items() if path and (item.mtime_ns or 0) < _BEGAN}
    return {
        path: replace(item, mtime_ns=item.mtime_ns if path in known else None, nlink=None)
        for path, item in tree.items()
    }


def printed(node: LazyNode, image: PushedImage, script: str) -> str:
    """What a shell prints in a pod of its own; it must succeed."""
    with node.cri.pod() as pod:
        container = pod.start(image.reference, "/bin/sh", "-c", script)
        assert container.wait().exit_code == 0, container.output()
        return container.output()


def containerd_status(node: LazyNode) -> protocol.ContainerdStatus:
    """What `firstbyte status` would show, without a process of its own: for waits."""
    reader = protocol.answer_reader()
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(WAIT_SECONDS)
        connection.connect(str(node.here.state / "firstbyte-control.sock"))
        connection.sendall(protocol.encode(protocol.StatusRequest()))
        while data := connection.recv(1 << 20):
            for message in reader.feed(data):
                if isinstance(message, protocol.Status):
                    assert message.containerd
                    return message.containerd
    raise AssertionError("the daemon does not answer")


def wait_local(node: LazyNode, image: PushedImage) -> None:
    """Wait until all of an image is on the node, and proven."""
    wait_until(
        lambda: any(
            shown.digest == image.digest and shown.state == "local"
            for shown in containerd_status(node).images
        )
    )


def all_local(node: LazyNode) -> bool:
    """Whether there are images, and all of them are on the node and proven."""
    images = containerd_status(node).images
    return bool(images) and all(shown.state == "local" for shown in images)


def reasons(node: LazyNode, image: PushedImage) -> dict[str, str]:
    """Why an image is not lazy, by kind. It must be told in every place, and once in the log."""
    found = {
        fallback["kind"]: fallback["reason"]
        for fallback in node.status()["fallbacks"]
        if fallback["reference"] == image.reference
    }
    text = node.here.succeed("status").splitlines()
    told = [line for line in text if line.startswith(f"not lazy: {image.reference}: ")]
    logged = [
        line for line in node.here.log().splitlines() if f"{image.reference} is not served" in line
    ]
    assert len(told) == len(logged) == len(found)
    for kind, reason in found.items():
        assert any(f"{reason} ({kind}, " in line for line in told)
        assert any(line.endswith(f" is not served lazily ({kind}): {reason}") for line in logged)
    return found
