"""Asks containerd and our own daemon over gRPC, with deadlines.

The few requests are empty messages, and of the answers only some fields are read (`wire.py`).
Sources: containerd's api/services/{version,introspection,snapshots}/v1/*.proto.
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

from index.errors import FirstByteError
from snapshotter.doctor.running import Plugin
from snapshotter.doctor.wire import fields

# gRPC reads these when it is imported. A server that is not there is a finding, not a log line.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")  # no child of ours uses it
import grpc

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_PLUGINS = "/containerd.services.introspection.v1.Introspection/Plugins"
_VERSION = "/containerd.services.version.v1.Version/Version"
_LIST = "/containerd.services.snapshots.v1.Snapshots/List"
_NAMESPACE = (("containerd-namespace", "default"),)  # containerd wants one with every call
_EMPTY = b""
_SECONDS = 5.0  # for each answer; a guess: a living server needs milliseconds
_BUFFERS = [("grpc.max_receive_message_length", 64 << 20)]


class CallError(FirstByteError):
    """A server did not answer, or answered with an error."""


def containerd_version(address: Path) -> str:
    """What the containerd at a socket says of itself. Raises CallError or WireError."""
    with _channel(address) as channel:
        answer = channel.unary_unary(_VERSION)(_EMPTY, timeout=_SECONDS, metadata=_NAMESPACE)
    return next((_text(value) for number, value in fields(answer) if number == 1), "")


def containerd_plugins(address: Path) -> list[Plugin]:
    """The plugins of the containerd at a socket. Raises CallError or WireError."""
    with _channel(address) as channel:
        answer = channel.unary_unary(_PLUGINS)(_EMPTY, timeout=_SECONDS, metadata=_NAMESPACE)
    return [read_plugin(value) for number, value in fields(answer) if number == 1]


def list_snapshots(address: Path) -> None:
    """Have the snapshotter at a socket list its snapshots. Raises CallError."""
    with _channel(address) as channel:
        answers = channel.unary_stream(_LIST)(_EMPTY, timeout=_SECONDS, metadata=_NAMESPACE)
        for _ in answers:  # the first part shows that it works
            answers.cancel()
            break


def read_plugin(message: bytes) -> Plugin:
    """The message Plugin of introspection.proto. Raises WireError."""
    texts = {1: "", 2: ""}  # type, id
    error = ""
    exports: dict[str, str] = {}
    for number, value in fields(message):
        if number in texts:
            texts[number] = _text(value)
        elif number == 5:  # exports: entries of a map, key 1 and value 2
            entry = dict(fields(value))
            exports[_text(entry.get(1, b""))] = _text(entry.get(2, b""))
        elif number == 7:  # init_err: google.rpc.Status, its message is 2
            error = _text(dict(fields(value)).get(2, b"")) or "no reason given"
    return Plugin(texts[1], texts[2], error, exports)


def _text(value: bytes) -> str:
    return value.decode(errors="replace")


@contextmanager
def _channel(address: Path) -> Iterator[grpc.Channel]:
    try:
        with grpc.insecure_channel(f"unix:{address}", options=_BUFFERS) as channel:
            yield channel
    except grpc.RpcError as error:
        raise CallError(_describe(error)) from error


def _describe(error: grpc.RpcError) -> str:
    """The library's words, without its addresses and times."""
    code = error.code()
    if code is grpc.StatusCode.UNAVAILABLE:
        return "nothing listens"
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return f"it does not answer within {_SECONDS:.0f} seconds"
    return f"{code.name.lower().replace('_', ' ')}: {error.details()}"
