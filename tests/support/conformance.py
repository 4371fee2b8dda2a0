"""The snapshots API as five services offer it, for tests that must hold for each of them.

FirstByte is asked at its own socket and as a proxy plugin of containerd; that containerd's
overlayfs passes says that a test is right. Where containerd answers before it asks a snapshotter,
and with another code, the differences are in the table below.
"""

from __future__ import annotations

import itertools
import os
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import grpc
import pytest

from snapshotter.containerd.snapshots import Info, Kind
from tests.support.containerd import RunningContainerd, Setup, Version, running_containerd
from tests.support.debian_root import shared
from tests.support.grpc_clients import SnapshotsClient, open_channel
from tests.support.instance import Instance, instance, wait_until
from tests.support.lazy_images import mounted

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from snapshotter.containerd.snapshots import Mount

FIRSTBYTE = "firstbyte"
SERVICES = (
    FIRSTBYTE,
    "overlayfs in 1.6",
    "overlayfs in 2.1",
    "firstbyte in 1.6",
    "firstbyte in 2.1",
)

_LEASES = "/containerd.services.leases.v1.Leases"
_ANSWER_WITHIN = 60.0  # seconds
_END_WITHIN = 30.0

OK = grpc.StatusCode.OK
NOT_FOUND = grpc.StatusCode.NOT_FOUND
ALREADY_EXISTS = grpc.StatusCode.ALREADY_EXISTS
FAILED_PRECONDITION = grpc.StatusCode.FAILED_PRECONDITION
INVALID_ARGUMENT = grpc.StatusCode.INVALID_ARGUMENT


@dataclass(frozen=True, slots=True)
class Difference:
    """A call that containerd answers itself: with another code than a snapshotter that is asked."""

    snapshotter: grpc.StatusCode
    containerd: grpc.StatusCode
    reason: str


CREATE_WITHOUT_NAME = Difference(
    INVALID_ARGUMENT,
    grpc.StatusCode.UNKNOWN,
    "containerd's database knows no empty keys, and its error has no code",
)
NO_NAME = Difference(
    INVALID_ARGUMENT,
    NOT_FOUND,
    "containerd looks for the empty key, as for any other",
)
NO_FILTER = Difference(
    INVALID_ARGUMENT,
    grpc.StatusCode.UNKNOWN,
    "containerd's List gives no code to errors: in them it reads 'invalid argument'",
)
NO_EXPRESSION = Difference(
    INVALID_ARGUMENT,
    OK,
    "containerd compiles regular expressions when it compares, and says problems in its log only",
)
COMMIT_NOTHING_TO_A_TAKEN_NAME = Difference(
    NOT_FOUND,
    ALREADY_EXISTS,
    "containerd looks at the name before it looks for the key",
)
CREATE_A_TAKEN_KEY_ON_NOTHING = Difference(
    NOT_FOUND,
    ALREADY_EXISTS,
    "containerd looks at the key before it looks for the parent",
)
UNPACK_A_TARGET_THAT_IS_THERE = Difference(
    OK,
    ALREADY_EXISTS,
    "containerd knows the names of its namespace, and a snapshotter only those of lazy layers",
)
CLEANUP = Difference(
    OK,
    grpc.StatusCode.UNIMPLEMENTED,
    "containerd calls Cleanup after its garbage collection, and passes nobody else's on",
)


class Daemon:
    """FirstByte alone. It runs when this is made."""

    def __init__(self, node: Instance) -> None:
        self._node = node
        self.socket = node.state / "firstbyte.sock"
        self.start()

    def start(self) -> None:
        """It answers when this returns."""
        self._process = self._node.start()
        wait_until(self._answers)

    def _answers(self) -> bool:
        assert self._process.poll() is None, "the daemon has ended"
        with Client(self.socket) as client:
            try:
                client.list()
            except grpc.RpcError:
                return False
        return True

    def kill(self) -> None:
        self._process.kill()
        self._process.wait(_END_WITHIN)

    def stop(self) -> None:
        """As an administrator does."""
        self._process.terminate()
        self._process.wait(_END_WITHIN)


class Service:
    """One of the services. `snapshots` is the directory of all snapshots' directories."""

    def __init__(
        self, daemon: Daemon | None, containerd: RunningContainerd | None, snapshots: Path
    ) -> None:
        self.snapshots = snapshots
        self.daemon = daemon
        self._containerd = containerd
        self._numbers = itertools.count(1)

    @property
    def behind_containerd(self) -> bool:
        return self._containerd is not None

    def client(self, namespace: str) -> Client:
        """A new connection. What is made belongs to a lease that has the namespace's name."""
        if self._containerd:
            snapshotter = "firstbyte" if self.daemon else "overlayfs"
            return Client(
                self._containerd.socket,
                namespace=namespace,
                snapshotter=snapshotter,
                lease=namespace,
            )
        assert self.daemon
        return Client(self.daemon.socket)

    def kill_and_start(self) -> None:
        """End all of its processes with kill -9, and start them; they answer when this returns."""
        if self._containerd:
            self._containerd.kill()
        if self.daemon:
            self.daemon.kill()
            self.daemon.start()
        if self._containerd:
            self._containerd.start()

    def lease(self, name: str, *, begin: bool) -> None:
        """Make a lease, or end it and wait for the garbage collection of what it kept."""
        if self._containerd is None:
            return
        # containerd.services.leases.v1: CreateRequest and DeleteRequest have field 1 `id`, the
        # latter field 2 `sync`.
        call = "Create" if begin else "Delete"
        request = bytes([0x0A, len(name)]) + name.encode() + (b"" if begin else b"\x10\x01")
        with open_channel(self._containerd.socket) as channel:
            channel.unary_unary(f"{_LEASES}/{call}")(
                request, metadata=(("containerd-namespace", name),), timeout=_ANSWER_WITHIN
            )

    @contextmanager
    def session(self, places: Path) -> Iterator[Session]:
        """An empty service. `places` is a directory for mount points.

        At the end all snapshots are removed, and nothing of them is left.
        """
        namespace = f"conformance-{next(self._numbers)}"
        self.lease(namespace, begin=True)
        made = Session(self, namespace, places)
        try:
            yield made
        finally:
            made.end()
        assert made.directories() == set()


@contextmanager
def running(name: str) -> Iterator[Service]:
    """One of SERVICES, for as long as the block runs."""
    snapshotter, _, version = name.partition(" in ")
    with ExitStack() as stack:
        daemon: Daemon | None = None
        setup = Setup(sandbox_image="none")
        binds = []
        if snapshotter == FIRSTBYTE:
            node = stack.enter_context(instance())
            stack.enter_context(shared(node.base))
            daemon = Daemon(node)
            stack.callback(daemon.stop)
            setup = Setup(sandbox_image="none", snapshotter="firstbyte", proxy=daemon.socket)
            binds = [node.base]
            snapshots = node.root / "containerd" / "snapshots"
        containerd: RunningContainerd | None = None
        if version:
            found: Version = "1.6" if version == "1.6" else "2.1"
            containerd = stack.enter_context(running_containerd(found, setup, binds=binds))
            if daemon is None:
                plugin = "io.containerd.snapshotter.v1.overlayfs"
                snapshots = containerd.root / plugin / "snapshots"
        yield Service(daemon, containerd, snapshots)


class Client(SnapshotsClient):
    """The ten calls, and some that people should not make."""

    def update_fields(self, fields: object, paths: Sequence[str] = ()) -> None:
        """Update with any fields of an Info."""
        self._call("Update", info=fields, update_mask={"paths": list(paths)})

    def names(self, *filters: str) -> set[str]:
        return {info.name for info in self.list(filters)}


class Session:
    """What one test does with a service."""

    def __init__(self, service: Service, namespace: str, places: Path) -> None:
        self._service = service
        self._namespace = namespace
        self._places = places
        self._numbers = itertools.count(1)
        self.calls = service.client(namespace)

    @property
    def behind_containerd(self) -> bool:
        return self._service.behind_containerd

    def another_client(self) -> Client:
        return self._service.client(self._namespace)

    def kill_and_start(self) -> None:
        self.calls.close()
        self._service.kill_and_start()
        self.calls = self.another_client()

    @property
    def snapshots(self) -> Path:
        """The directory of all snapshots' directories."""
        return self._service.snapshots

    def directories(self) -> set[str]:
        """The names of all directories of snapshots, be they known or left over."""
        return set(os.listdir(self.snapshots))

    def collect(self) -> None:
        """Have the directories of removed snapshots deleted."""
        if not self.behind_containerd:
            self.calls.cleanup()
            return
        # containerd cleans up after it has collected a snapshot itself, so let there be one.
        other = f"{self._namespace}-{next(self._numbers)}"
        self._service.lease(other, begin=True)
        with self._service.client(other) as client:
            client.prepare("garbage")
        self._service.lease(other, begin=False)

    def end(self) -> None:
        """Remove all there is."""
        if self.behind_containerd:
            self._service.lease(self._namespace, begin=False)
        else:
            while found := self.calls.list():
                parents = {info.parent for info in found}
                for info in found:
                    if info.name not in parents:
                        self.calls.remove(info.name)
        assert self.calls.list() == ()
        self.collect()
        self.calls.close()

    @contextmanager
    def refused(self, expected: grpc.StatusCode | Difference) -> Iterator[None]:
        """The block's call fails with this code, or succeeds if it is OK."""
        reason = ""
        if isinstance(expected, Difference):
            reason = expected.reason
            expected = expected.containerd if self.behind_containerd else expected.snapshotter
        if expected is OK:
            yield
            return
        with pytest.raises(grpc.RpcError) as raised:
            yield
        assert raised.value.code() is expected, f"{raised.value.details()} ({reason})"
        assert raised.value.details()

    @contextmanager
    def shown(self, mounts: Sequence[Mount]) -> Iterator[Path]:
        """What mounts show, for as long as the block runs."""
        with mounted(mounts, self._places / f"shown-{next(self._numbers)}") as place:
            yield place

    @contextmanager
    def viewed(self, parent: str) -> Iterator[Path]:
        """What a container on `parent` would see, in a snapshot of its own."""
        key = f"viewed-{next(self._numbers)}"
        with self.shown(self.calls.view(key, parent)) as place:
            yield place
        self.calls.remove(key)

    def add_layer(
        self, name: str, parent: str = "", change: Callable[[Path], object] | None = None
    ) -> Info:
        """A committed snapshot, made as containerd unpacks an image's layer."""
        key = f"extract-{next(self._numbers)} {name}"
        mounts = self.calls.prepare(key, parent)
        if change:
            with self.shown(mounts) as place:
                change(place)
        self.calls.commit(name, key)
        return self.calls.stat(name)

    def add_one_of_each(self) -> None:
        """Snapshots of every kind, with and without a parent: committed ones and what is on them.

        low <- high <- top, view;  active, loose (without parent)
        """
        self.add_layer("low")
        self.add_layer("high", "low")
        self.calls.prepare("active", "high")
        self.calls.view("view", "high")
        self.calls.prepare("loose")
        self.calls.view("loose view")


KINDS = {
    "low": Kind.COMMITTED,
    "high": Kind.COMMITTED,
    "active": Kind.ACTIVE,
    "view": Kind.VIEW,
    "loose": Kind.ACTIVE,
    "loose view": Kind.VIEW,
}
PARENTS = {
    "low": "",
    "high": "low",
    "active": "high",
    "view": "high",
    "loose": "",
    "loose view": "",
}


def write(name: str, text: str) -> Callable[[Path], object]:
    """A change that makes a file."""
    return partial(_write, name, text)


def _write(name: str, text: str, place: Path) -> None:
    (place / name).write_text(text)
