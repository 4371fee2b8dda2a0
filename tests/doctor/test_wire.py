"""Protobuf messages are read as protobuf's own library writes them."""

from __future__ import annotations

import contextlib

import pytest
from google.protobuf import descriptor_pb2
from hypothesis import given
from hypothesis import strategies as st

from snapshotter.doctor.calls import read_plugin
from snapshotter.doctor.wire import WireError, fields


@given(
    name=st.text(max_size=300), package=st.text(max_size=20), depends=st.lists(st.text(max_size=9))
)
def test_fields_are_what_was_written(name: str, package: str, depends: list[str]) -> None:
    message = descriptor_pb2.FileDescriptorProto(name=name, package=package, dependency=depends)
    message.public_dependency.append(7)  # a number, which is passed over
    found = list(fields(message.SerializeToString()))
    assert sorted(found) == sorted(
        [(1, name.encode()), (2, package.encode()), *((3, one.encode()) for one in depends)]
    )


def test_fixed_width_numbers_are_passed_over() -> None:
    assert list(fields(b"\x09" + bytes(8) + b"\x15" + bytes(4) + b"\x1a\x01x")) == [(3, b"x")]


@pytest.mark.parametrize("cut", [b"\x0a", b"\x0a\x05abc", b"\x80", b"\x0b", b"\xff" * 11])
def test_what_is_no_message_is_refused(cut: bytes) -> None:
    with pytest.raises(WireError):
        list(fields(cut))


@given(st.binary(max_size=200))
def test_any_bytes_are_a_plugin_or_refused(data: bytes) -> None:
    with contextlib.suppress(WireError):
        read_plugin(data)


def test_a_plugin_with_exports_and_an_error() -> None:
    export = b"\x0a\x04root\x12\x02/x"
    status = b"\x08\x02\x12\x03bad"
    message = b"\x0a\x01t\x12\x01i" + b"\x2a" + bytes([len(export)]) + export
    plugin = read_plugin(message + b"\x3a" + bytes([len(status)]) + status)
    assert (plugin.type, plugin.id, plugin.error) == ("t", "i", "bad")
    assert plugin.exports == {"root": "/x"}
