"""What a kubelet asks of a container runtime: the CRI, over gRPC.

Calls fail with `grpc.RpcError`; its `code()` and `details()` are what the runtime says. Every call
has a deadline.
"""

from __future__ import annotations

import tempfile
import time
import uuid
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from grpc_tools import protoc

if TYPE_CHECKING:
    from collections.abc import Iterator

_PROTOS = Path(__file__).parent / "protos"
_PACKAGE = "runtime.v1"

_CALL_SECONDS = 60
_PULL_SECONDS = 120
_POLL_SECONDS = 0.02
_LAST_POLL_SECONDS = 0.3  # when it takes long: dozens that ask at once keep a processor busy


@dataclass(frozen=True, slots=True)
class Image:
    """An image as the runtime knows it; `size` in bytes, of what its registry sends."""

    id: str
    tags: tuple[str, ...]
    digests: tuple[str, ...]
    size: int
    pinned: bool


@dataclass(frozen=True, slots=True)
class Usage:
    """What the images take of the file system at `mountpoint`."""

    mountpoint: str
    size: int
    inodes: int


@dataclass(frozen=True, slots=True)
class Status:
    """State of a container: "created", "running", "exited" or "unknown"."""

    state: str
    exit_code: int
    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class Executed:
    """What a command in a container left."""

    stdout: str
    stderr: str
    exit_code: int


class Cri:
    """Client of the runtime at a socket.

    Pods that it makes write their logs to `logs` and have their cgroups below `cgroup`.
    """

    def __init__(self, socket: Path, *, logs: Path, cgroup: str) -> None:
        self.logs = logs
        self._cgroup = cgroup
        options = [
            # Go's server refuses the socket's path, which would be the default.
            ("grpc.default_authority", "localhost"),
            # The runtime may be starting just now: the default is a second.
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.min_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 200),
            # Another client's connection to a socket of the same name is not ours.
            ("grpc.use_local_subchannel_pool", 1),
        ]
        self._channel = grpc.insecure_channel(f"unix:{socket}", options=options)

    def close(self) -> None:
        self._channel.close()

    def call(
        self, name: str, request: dict[str, Any] | None = None, seconds: float = _CALL_SECONDS
    ) -> Any:
        """Make a call by its name; the response is a protobuf message."""
        service, method = _methods()[name]
        encoder, decoder = _message(method.input_type), _message(method.output_type)
        send = self._channel.unary_unary(
            f"/{_PACKAGE}.{service}/{name}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=decoder.FromString,
        )
        return send(encoder(**(request or {})), timeout=seconds)

    def pull(self, reference: str, *, auth: tuple[str, str] | None = None) -> str:
        """Pull an image, as a user with a password if `auth`; returns its ID."""
        request: dict[str, Any] = {"image": {"image": reference}}
        if auth:
            request["auth"] = {"username": auth[0], "password": auth[1]}
        found: str = self.call("PullImage", request, _PULL_SECONDS).image_ref
        return found

    def image(self, reference: str) -> Image | None:
        """ImageStatus."""
        response = self.call("ImageStatus", {"image": {"image": reference}})
        return _image(response.image) if response.HasField("image") else None

    def images(self) -> list[Image]:
        """ListImages."""
        return [_image(message) for message in self.call("ListImages").images]

    def remove_image(self, reference: str) -> None:
        """RemoveImage, after which the runtime collects its garbage."""
        self.call("RemoveImage", {"image": {"image": reference}})

    def image_usage(self) -> Usage:
        """ImageFsInfo. The runtime gathers it every ten seconds."""
        (found,) = self.call("ImageFsInfo").image_filesystems
        return Usage(found.fs_id.mountpoint, found.used_bytes.value, found.inodes_used.value)

    def containers(self) -> list[str]:
        """ListContainers: IDs of those that are not removed, running or not."""
        return [message.id for message in self.call("ListContainers").containers]

    def run_pod(self, name: str = "pod") -> Pod:
        """A pod in the host's network, without containers yet."""
        identity = {"name": name, "uid": uuid.uuid4().hex, "namespace": "default"}
        config = {
            "metadata": identity,
            "log_directory": str(self.logs / identity["uid"]),
            "linux": {
                "cgroup_parent": self._cgroup,
                "security_context": {"namespace_options": {"network": "NODE"}},
            },
        }
        return Pod(self, self.call("RunPodSandbox", {"config": config}).pod_sandbox_id, config)

    @contextmanager
    def pod(self, name: str = "pod") -> Iterator[Pod]:
        """As `run_pod`; it goes at the end of the block, with its containers."""
        made = self.run_pod(name)
        try:
            yield made
        finally:
            made.remove()


class Pod:
    """A running pod."""

    def __init__(self, cri: Cri, identifier: str, config: dict[str, Any]) -> None:
        self.id = identifier
        self._cri = cri
        self._config = config

    def create(self, image: str, *command: str) -> Container:
        """A container of an image that is here; with the image's own command if there is none."""
        name = uuid.uuid4().hex
        options = {"network": "NODE", "pid": "CONTAINER"}
        config = {
            "metadata": {"name": name},
            "image": {"image": image},
            "command": command,
            "log_path": f"{name}.log",
            "linux": {"security_context": {"namespace_options": options}},
        }
        request = {"pod_sandbox_id": self.id, "config": config, "sandbox_config": self._config}
        log = Path(self._config["log_directory"]) / f"{name}.log"
        return Container(self._cri, self._cri.call("CreateContainer", request).container_id, log)

    def start(self, image: str, *command: str) -> Container:
        """Create a container and start it."""
        container = self.create(image, *command)
        container.start()
        return container

    def remove(self) -> None:
        """Stop it and remove it, with its containers."""
        self._cri.call("StopPodSandbox", {"pod_sandbox_id": self.id})
        self._cri.call("RemovePodSandbox", {"pod_sandbox_id": self.id})


class Container:
    """A container of a pod."""

    def __init__(self, cri: Cri, identifier: str, log: Path) -> None:
        self.id = identifier
        self._cri = cri
        self._log = log

    def start(self) -> None:
        self._cri.call("StartContainer", {"container_id": self.id})

    def execute(self, *command: str, seconds: int = 30) -> Executed:
        """ExecSync: run another command in it."""
        request = {"container_id": self.id, "cmd": command, "timeout": seconds}
        found = self._cri.call("ExecSync", request, seconds + _CALL_SECONDS)
        return Executed(found.stdout.decode(), found.stderr.decode(), found.exit_code)

    def status(self) -> Status:
        found = self._cri.call("ContainerStatus", {"container_id": self.id}).status
        states = _pool().FindEnumTypeByName(f"{_PACKAGE}.ContainerState").values_by_number
        state = states[found.state].name.removeprefix("CONTAINER_").lower()
        return Status(state, found.exit_code, found.reason, found.message)

    def wait(self, seconds: float = _CALL_SECONDS) -> Status:
        """The status once it has ended."""
        deadline = time.monotonic() + seconds
        pause = _POLL_SECONDS
        while (status := self.status()).state != "exited":
            assert time.monotonic() < deadline, f"{status}; it printed: {self.output()}"
            time.sleep(pause)
            pause = min(1.5 * pause, _LAST_POLL_SECONDS)
        return status

    def output(self) -> str:
        """What it has printed so far, standard output and errors together."""
        if not self._log.exists():
            return ""
        # A line is "TIME stdout F TEXT", or with P if the line goes on in the next.
        entries = [line.split(" ", 3) for line in self._log.read_text().splitlines()]
        return "".join(text + ("\n" if tag == "F" else "") for _, _, tag, text in entries)

    def stop(self, grace: int = 0) -> None:
        """StopContainer: kill it, after `grace` seconds in which it may end by itself."""
        self._cri.call("StopContainer", {"container_id": self.id, "timeout": grace})

    def remove(self) -> None:
        self._cri.call("RemoveContainer", {"container_id": self.id})


def _image(message: Any) -> Image:
    return Image(
        id=message.id,
        tags=tuple(message.repo_tags),
        digests=tuple(message.repo_digests),
        size=message.size,
        pinned=message.pinned,
    )


@cache
def _files() -> descriptor_pb2.FileDescriptorSet:
    with tempfile.NamedTemporaryFile() as output:
        arguments = ["protoc", f"-I{_PROTOS}", f"--descriptor_set_out={output.name}", "cri.proto"]
        assert protoc.main(arguments) == 0
        return descriptor_pb2.FileDescriptorSet.FromString(Path(output.name).read_bytes())


@cache
def _pool() -> descriptor_pool.DescriptorPool:
    pool = descriptor_pool.DescriptorPool()
    for file in _files().file:
        pool.Add(file)
    return pool


@cache
def _methods() -> dict[str, tuple[str, descriptor_pb2.MethodDescriptorProto]]:
    """Service and description of each call."""
    return {
        method.name: (service.name, method)
        for file in _files().file
        for service in file.service
        for method in service.method
    }


def _message(name: str) -> Any:
    descriptor = _pool().FindMessageTypeByName(name.removeprefix("."))
    return message_factory.GetMessageClass(descriptor)
