"""The wire format is containerd's, and our values survive it."""

from __future__ import annotations

import subprocess
from contextlib import suppress
from importlib import resources
from pathlib import Path

import pytest
from google.protobuf import descriptor_pb2
from hypothesis import given
from hypothesis import strategies as st

from snapshotter.containerd import messages
from snapshotter.containerd.errors import InvalidArgumentError
from snapshotter.containerd.messages import METHODS
from snapshotter.containerd.snapshots import Info, Kind, Mount

_ROOT = Path(__file__).parents[2]

# Of containerd's api/services/snapshots/v1/snapshots.proto and api/types/mount.proto.
_PLACE = {"snapshotter": 1, "key": 2}
_REQUESTS = {
    "Prepare": {**_PLACE, "parent": 3, "labels": 4},
    "View": {**_PLACE, "parent": 3, "labels": 4},
    "Mounts": _PLACE,
    "Commit": {"snapshotter": 1, "name": 2, "key": 3, "labels": 4, "parent": 5},
    "Remove": _PLACE,
    "Stat": _PLACE,
    "Update": {"snapshotter": 1, "info": 2, "update_mask": 3},
    "List": {"snapshotter": 1, "filters": 2},
    "Usage": _PLACE,
    "Cleanup": {"snapshotter": 1},
}
_RESPONSES = {
    "Prepare": {"mounts": 1},
    "View": {"mounts": 1},
    "Mounts": {"mounts": 1},
    "Commit": {},
    "Remove": {},
    "Stat": {"info": 1},
    "Update": {"info": 1},
    "List": {"info": 1},
    "Usage": {"size": 1, "inodes": 2},
    "Cleanup": {},
}
_INFO = {"name": 1, "parent": 2, "kind": 3, "created_at": 4, "updated_at": 5, "labels": 6}
_MOUNT = {"type": 1, "source": 2, "target": 3, "options": 4}

_text = st.text(st.characters(codec="utf-8"))


def _numbers(descriptor) -> dict[str, int]:
    return {field.name: field.number for field in descriptor.fields}


def test_the_descriptors_are_those_of_the_proto_files(tmp_path: Path) -> None:
    fresh = tmp_path / "fresh.binpb"
    subprocess.run([_ROOT / "scripts/make-descriptors", fresh], check=True, timeout=60)

    def files(packed: bytes) -> dict[str, descriptor_pb2.FileDescriptorProto]:
        return {
            file.name: file for file in descriptor_pb2.FileDescriptorSet.FromString(packed).file
        }

    ours = files(
        resources.files("snapshotter.containerd").joinpath("api/snapshots.binpb").read_bytes()
    )
    made = files(fresh.read_bytes())
    assert list(ours) == list(made)
    for name in ("mount.proto", "snapshots.proto"):  # the others are as protoc has them
        assert ours[name] == made[name]


@pytest.mark.parametrize("name", METHODS)
def test_fields_have_the_numbers_of_containerd(name: str) -> None:
    method = METHODS[name]
    assert _numbers(method.request.DESCRIPTOR) == _REQUESTS[name]
    assert _numbers(method.response.DESCRIPTOR) == _RESPONSES[name]
    assert method.streams == (name == "List")


def test_there_are_ten_calls() -> None:
    assert set(METHODS) == set(_REQUESTS)
    stat, mounts = METHODS["Stat"].response.DESCRIPTOR, METHODS["Mounts"].response.DESCRIPTOR
    info = stat.fields_by_name["info"].message_type
    assert _numbers(info) == _INFO
    assert _numbers(mounts.fields_by_name["mounts"].message_type) == _MOUNT
    kinds = info.fields_by_name["kind"].enum_type.values
    assert {kind.name: kind.number for kind in kinds} == {
        "UNKNOWN": 0,
        "VIEW": 1,
        "ACTIVE": 2,
        "COMMITTED": 3,
    }


def test_a_request_of_containerd() -> None:
    sent = b"\x0a\x09firstbyte\x12\x01k\x1a\x01p\x22\x06\x0a\x01a\x12\x01b"
    request = METHODS["Prepare"].decode(sent)
    assert (request.snapshotter, request.key, request.parent) == ("firstbyte", "k", "p")
    assert dict(request.labels) == {"a": "b"}


def test_fields_of_a_newer_containerd_are_left_alone() -> None:
    assert METHODS["Mounts"].decode(b"\x12\x01k\xfa\x01\x03new").key == "k"


@given(
    mounts=st.lists(
        st.builds(Mount, _text, _text, st.lists(_text).map(tuple), target=_text), max_size=5
    )
)
def test_mounts(mounts: list[Mount]) -> None:
    (response,) = messages.mounts_response(METHODS["Mounts"], mounts)
    back = METHODS["Mounts"].response.FromString(response.SerializeToString()).mounts
    assert mounts == [Mount(m.type, m.source, tuple(m.options), m.target) for m in back]


@pytest.mark.parametrize(
    ("nanoseconds", "seconds", "nanos"),
    [
        (0, 0, 0),
        (1_700_000_000_123_456_789, 1_700_000_000, 123_456_789),
        (-1, -1, 999_999_999),  # nanos count forwards
    ],
)
def test_times(nanoseconds: int, seconds: int, nanos: int) -> None:
    info = Info(Kind.ACTIVE, "k", "", {}, nanoseconds, nanoseconds)
    (response,) = messages.info_response(METHODS["Stat"], info)
    for time in (response.info.created_at, response.info.updated_at):
        assert (time.seconds, time.nanos) == (seconds, nanos)


@pytest.mark.parametrize(
    ("count", "pieces"), [(0, []), (1, [1]), (100, [100]), (101, [100, 1]), (250, [100, 100, 50])]
)
def test_a_list_comes_in_pieces(count: int, pieces: list[int]) -> None:
    infos = [Info(Kind.COMMITTED, str(n), "", {}, n, n) for n in range(count)]
    responses = messages.infos_responses(METHODS["List"], infos)
    assert [len(response.info) for response in responses] == pieces
    names = [info.name for response in responses for info in response.info]
    assert names == [info.name for info in infos]


@given(data=st.binary(max_size=64), name=st.sampled_from(sorted(METHODS)))
def test_bytes_are_a_request_or_an_invalid_argument(data: bytes, name: str) -> None:
    with suppress(InvalidArgumentError):
        METHODS[name].decode(data)


@pytest.mark.parametrize(
    "data",
    [
        b"\x12\x05k",  # cut short
        b"\x12\x01\xff",  # no UTF-8
        b"\xff",
    ],
)
def test_what_is_no_request(data: bytes) -> None:
    with pytest.raises(InvalidArgumentError, match="the request of Mounts is no containerd"):
        METHODS["Mounts"].decode(data)
