"""containerd's side of the snapshot service, for tests: each call in terms of our values."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self
from urllib.parse import quote

import grpc

from snapshotter.containerd.messages import METHODS, SERVICE
from snapshotter.containerd.snapshots import Info, Kind, Mount, Usage

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

LIMIT = 16 << 20  # bytes of a message, as containerd's clients have it
_ANSWER_WITHIN = 60.0  # seconds
_KINDS = {"VIEW": Kind.VIEW, "ACTIVE": Kind.ACTIVE, "COMMITTED": Kind.COMMITTED}


def open_channel(address: Path) -> grpc.Channel:
    """A connection of its own to the socket at `address`, to be closed by the caller."""
    return grpc.insecure_channel(
        f"unix:{quote(str(address))}",
        options=(
            ("grpc.max_receive_message_length", LIMIT),
            ("grpc.max_send_message_length", -1),
            ("grpc.use_local_subchannel_pool", 1),  # share no connection, nor a wait after failures
            ("grpc.enable_http_proxy", 0),
        ),
    )


def unary(channel: grpc.Channel, name: str) -> grpc.UnaryUnaryMultiCallable:
    """A method of the service, from bytes to bytes."""
    return channel.unary_unary(f"/{SERVICE}/{name}")


class SnapshotsClient:
    """Calls a snapshotter, or containerd's own service in front of it (then name the snapshotter).

    Synchronous: from trio, call it in a thread. Raises grpc.RpcError, whose code() says why; where
    nobody listens, UNAVAILABLE.
    `namespace` and `lease` are the metadata that containerd wants; `timeout` is the deadline of
    each call, in seconds.
    """

    def __init__(
        self,
        address: Path,
        *,
        namespace: str | None = None,
        snapshotter: str = "",
        lease: str | None = None,
        timeout: float = _ANSWER_WITHIN,
    ) -> None:
        self._channel = open_channel(address)
        self._snapshotter = snapshotter
        self._timeout = timeout
        self._metadata = tuple(
            (key, value)
            for key, value in (("containerd-namespace", namespace), ("containerd-lease", lease))
            if value is not None
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Hang up; calls that wait for an answer are cancelled."""
        self._channel.close()

    def prepare(
        self, key: str, parent: str = "", labels: Mapping[str, str] | None = None
    ) -> tuple[Mount, ...]:
        return _mounts(self._call("Prepare", key=key, parent=parent, labels=dict(labels or {})))

    def view(
        self, key: str, parent: str = "", labels: Mapping[str, str] | None = None
    ) -> tuple[Mount, ...]:
        return _mounts(self._call("View", key=key, parent=parent, labels=dict(labels or {})))

    def mounts(self, key: str) -> tuple[Mount, ...]:
        return _mounts(self._call("Mounts", key=key))

    def commit(
        self, name: str, key: str, labels: Mapping[str, str] | None = None, parent: str = ""
    ) -> None:
        self._call("Commit", name=name, key=key, labels=dict(labels or {}), parent=parent)

    def remove(self, key: str) -> None:
        self._call("Remove", key=key)

    def stat(self, key: str) -> Info:
        return _info(self._call("Stat", key=key).info)

    def update(self, name: str, labels: Mapping[str, str], fieldpaths: Sequence[str] = ()) -> Info:
        response = self._call(
            "Update",
            info={"name": name, "labels": dict(labels)},
            update_mask={"paths": list(fieldpaths)},
        )
        return _info(response.info)

    def list(self, filters: Sequence[str] = ()) -> tuple[Info, ...]:
        return tuple(info for piece in self.list_pieces(filters) for info in piece)

    def list_pieces(self, filters: Sequence[str] = ()) -> tuple[tuple[Info, ...], ...]:
        """List, as it comes: the snapshots of each message."""
        method = METHODS["List"]
        request = method.request(snapshotter=self._snapshotter, filters=list(filters))
        responses = self._channel.unary_stream(f"/{SERVICE}/List")(
            request.SerializeToString(), timeout=self._timeout, metadata=self._metadata
        )
        return tuple(
            tuple(_info(info) for info in method.response.FromString(data).info)
            for data in responses
        )

    def usage(self, key: str) -> Usage:
        response = self._call("Usage", key=key)
        return Usage(inodes=response.inodes, size=response.size)

    def cleanup(self) -> None:
        self._call("Cleanup")

    def _call(self, call: str, /, **fields: object) -> Any:
        method = METHODS[call]
        request = method.request(snapshotter=self._snapshotter, **fields)
        data = unary(self._channel, call)(
            request.SerializeToString(), timeout=self._timeout, metadata=self._metadata
        )
        return method.response.FromString(data)


def _mounts(response: Any) -> tuple[Mount, ...]:
    return tuple(
        Mount(mount.type, mount.source, tuple(mount.options), mount.target)
        for mount in response.mounts
    )


def _info(info: Any) -> Info:
    kind = info.DESCRIPTOR.fields_by_name["kind"].enum_type.values_by_number[info.kind].name
    return Info(
        kind=_KINDS[kind],
        name=info.name,
        parent=info.parent,
        labels=dict(info.labels),
        created_ns=_nanoseconds(info.created_at),
        updated_ns=_nanoseconds(info.updated_at),
    )


def _nanoseconds(timestamp: Any) -> int:
    return int(timestamp.seconds) * 1_000_000_000 + int(timestamp.nanos)
