"""containerd's snapshot service on the wire: its methods, their messages, our values in them.

The messages are made at run time from `api/snapshots.binpb`. Code that protoc generates would have
to be of the version of the protobuf package that runs it; a descriptor set is good for them all. It
is read into a pool of its own: other users of protobuf in the process may describe containerd's
messages in their way.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING, TypeAlias

from google.protobuf import descriptor_pb2, descriptor_pool, message, message_factory

from snapshotter.containerd.errors import InvalidArgumentError
from snapshotter.containerd.snapshots import Kind

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from snapshotter.containerd.snapshots import Info, Mount, Usage

Message: TypeAlias = message.Message

_PACKAGE = "containerd.services.snapshots.v1"
SERVICE = f"{_PACKAGE}.Snapshots"

_INFOS = 100  # in a message of List, as containerd's own service does
_NANOSECONDS = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Method:
    """A method of the service. `streams`: it answers with any number of responses, not one."""

    name: str
    request: type[Message]
    response: type[Message]
    streams: bool

    def decode(self, data: bytes) -> Message:
        """A request. Raises InvalidArgumentError."""
        try:
            return self.request.FromString(data)
        except message.DecodeError as error:
            raise InvalidArgumentError(
                f"the request of {self.name} is no {self.request.DESCRIPTOR.full_name}"
            ) from error


def _pool() -> descriptor_pool.DescriptorPool:
    packed = resources.files(__package__).joinpath("api/snapshots.binpb").read_bytes()
    pool = descriptor_pool.DescriptorPool()
    for file in descriptor_pb2.FileDescriptorSet.FromString(packed).file:
        pool.Add(file)  # protoc writes a file after those that it imports
    return pool


def _methods(pool: descriptor_pool.DescriptorPool) -> dict[str, Method]:
    return {
        method.name: Method(
            method.name,
            message_factory.GetMessageClass(method.input_type),
            message_factory.GetMessageClass(method.output_type),
            method.server_streaming,
        )
        for method in pool.FindServiceByName(SERVICE).methods
    }


_POOL = _pool()
METHODS: Mapping[str, Method] = _methods(_POOL)
_KINDS = _POOL.FindEnumTypeByName(f"{_PACKAGE}.Kind").values_by_name
_NUMBERS: Mapping[Kind, int] = {kind: _KINDS[kind.name].number for kind in Kind}


def mounts_response(method: Method, mounts: Sequence[Mount]) -> list[Message]:
    """What Prepare, View and Mounts answer."""
    return [
        method.response(
            mounts=[
                {
                    "type": mount.type,
                    "source": mount.source,
                    "target": mount.target,
                    "options": mount.options,
                }
                for mount in mounts
            ]
        )
    ]


def info_response(method: Method, info: Info) -> list[Message]:
    """What Stat and Update answer."""
    return [method.response(info=_fields(info))]


def infos_responses(method: Method, infos: Sequence[Info]) -> list[Message]:
    """What List answers: pieces that fit into a message."""
    return [
        method.response(info=[_fields(info) for info in infos[start : start + _INFOS]])
        for start in range(0, len(infos), _INFOS)
    ]


def usage_response(method: Method, usage: Usage) -> list[Message]:
    """What Usage answers."""
    return [method.response(size=usage.size, inodes=usage.inodes)]


def empty_response(method: Method, _nothing: None) -> list[Message]:
    """What calls answer that only do something."""
    return [method.response()]


def _fields(info: Info) -> dict[str, object]:
    return {
        "name": info.name,
        "parent": info.parent,
        "kind": _NUMBERS[info.kind],
        "created_at": _timestamp(info.created_ns),
        "updated_at": _timestamp(info.updated_ns),
        "labels": dict(info.labels),
    }


def _timestamp(nanoseconds: int) -> dict[str, int]:
    # Before the epoch too, nanos count forwards.
    seconds, nanos = divmod(nanoseconds, _NANOSECONDS)
    return {"seconds": seconds, "nanos": nanos}
