"""FUSE_INIT as bytes and values: what is read is what is written, and one flag is added."""

from __future__ import annotations

import struct
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapshotter.fuse.handshake import (
    HandshakeError,
    InitFlag,
    InitReply,
    InitRequest,
    allow_background,
    allow_idmap,
    parse_reply,
    parse_request,
    refuse_async_direct,
    take_up,
)

# What Linux 6.18 says, and what libfuse 3.14 answered.
KERNEL_SAYS = bytes.fromhex(
    "680000001a00000002000000000000000000000000000000000000000000000000000000000000000700000"
    "02d00000000000200fbffff73fd05000000" + "00" * 43
)

u16 = st.integers(0, 2**16 - 1)
u32 = st.integers(0, 2**32 - 1)
u64 = st.integers(0, 2**64 - 1)


@st.composite
def flags(draw: st.DrawFn) -> InitFlag:
    """As the protocol can carry them: the upper half only if the lower announces it."""
    low = InitFlag(draw(u32))
    return low | InitFlag(draw(u32) << 32) if InitFlag.EXTENDED in low else low


requests = st.builds(
    InitRequest,
    unique=u64,
    minor=u32,
    max_readahead=u32,
    flags=flags(),
    later=st.binary(max_size=60),
)
replies = st.builds(
    InitReply,
    unique=u64,
    minor=u32,
    max_readahead=u32,
    flags=flags(),
    max_background=u16,
    congestion_threshold=u16,
    max_write=u32,
    time_granularity=u32,
    max_pages=u16,
    map_alignment=u16,
    later=st.binary(min_size=28, max_size=28),
)


def test_a_real_request_is_understood() -> None:
    request = parse_request(KERNEL_SAYS)
    assert (request.unique, request.minor, request.max_readahead) == (2, 45, 128 << 10)
    assert InitFlag.ALLOW_IDMAP in request.flags
    assert request.pack() == KERNEL_SAYS


def test_the_request_of_a_kernel_before_5_17_is_short() -> None:
    old = InitRequest(unique=1, minor=34, max_readahead=4096, flags=InitFlag(0x3F), later=b"")
    assert len(old.pack()) == 56
    assert parse_request(old.pack()) == old


@given(requests)
def test_requests_survive_packing(request: InitRequest) -> None:
    assert parse_request(request.pack()) == request


@given(replies)
def test_replies_survive_packing(reply: InitReply) -> None:
    packed = reply.pack()
    assert len(packed) == 16 + 64
    assert parse_reply(packed) == reply


@given(replies)
def test_fields_lie_where_the_kernel_has_them(reply: InitReply) -> None:
    packed = reply.pack()
    assert struct.unpack_from("=IiQ", packed) == (80, 0, reply.unique)
    assert struct.unpack_from("=II", packed, 16) == (7, reply.minor)
    assert struct.unpack_from("=I", packed, 36) == (reply.max_write,)
    assert struct.unpack_from("=H", packed, 44) == (reply.max_pages,)
    low, high = struct.unpack_from("=I", packed, 28)[0], struct.unpack_from("=I", packed, 48)[0]
    assert low | high << 32 == reply.flags


@given(replies, requests)
def test_idmapped_mounts_are_allowed_if_offered_and_nothing_else_changes(
    reply: InitReply, request: InitRequest
) -> None:
    offered = replace(request, flags=request.flags | InitFlag.EXTENDED | InitFlag.ALLOW_IDMAP)
    allowed = parse_reply(allow_idmap(reply, offered).pack())
    assert {InitFlag.EXTENDED, InitFlag.ALLOW_IDMAP} <= set(allowed.flags)
    assert replace(allowed, flags=reply.flags) == reply
    assert allowed.flags & ~(InitFlag.EXTENDED | InitFlag.ALLOW_IDMAP) == reply.flags & ~(
        InitFlag.EXTENDED | InitFlag.ALLOW_IDMAP
    )
    not_offered = replace(request, flags=request.flags & ~InitFlag.ALLOW_IDMAP)
    assert allow_idmap(reply, not_offered) == reply


@given(replies)
def test_direct_reads_send_one_request_at_a_time_and_nothing_else_changes(reply: InitReply) -> None:
    refused = refuse_async_direct(reply)
    assert InitFlag.ASYNC_DIO not in refused.flags
    assert replace(refused, flags=reply.flags) == reply
    assert refused.flags | InitFlag.ASYNC_DIO == reply.flags | InitFlag.ASYNC_DIO


@given(replies, st.integers(1, 2**16 - 1))
def test_more_may_be_in_flight_and_nothing_else_changes(reply: InitReply, most: int) -> None:
    allowed = parse_reply(allow_background(reply, most).pack())
    assert allowed.max_background == most >= allowed.congestion_threshold
    assert reply == replace(
        allowed,
        max_background=reply.max_background,
        congestion_threshold=reply.congestion_threshold,
    )


@given(replies, requests)
def test_what_is_offered_and_costs_nothing_is_taken_and_nothing_else_changes(
    reply: InitReply, request: InitRequest
) -> None:
    either = reply.flags | request.flags
    taken = parse_reply(take_up(reply, request).pack())
    for flag in (InitFlag.CACHE_SYMLINKS, InitFlag.PARALLEL_DIROPS):
        assert (flag in taken.flags) == (flag in either)
    assert replace(taken, flags=reply.flags) == reply
    both = InitFlag.CACHE_SYMLINKS | InitFlag.PARALLEL_DIROPS
    assert taken.flags | both == reply.flags | both


@given(st.binary(max_size=120))
def test_what_is_no_handshake_is_refused(message: bytes) -> None:
    for parse in (parse_request, parse_reply):
        with pytest.raises(HandshakeError):
            parse(message)


@given(requests, st.data())
def test_a_cut_request_is_refused(request: InitRequest, data: st.DataObject) -> None:
    packed = request.pack()
    with pytest.raises(HandshakeError, match="bytes"):
        parse_request(packed[: data.draw(st.integers(0, len(packed) - 1))])


def test_another_request_is_named() -> None:
    lookup = KERNEL_SAYS[:4] + struct.pack("=I", 1) + KERNEL_SAYS[8:]
    with pytest.raises(HandshakeError, match="is request 1 and not FUSE_INIT"):
        parse_request(lookup)


def test_another_protocol_is_named() -> None:
    future = KERNEL_SAYS[:40] + struct.pack("=I", 8) + KERNEL_SAYS[44:]
    with pytest.raises(HandshakeError, match="the kernel speaks FUSE 8, FirstByte speaks FUSE 7"):
        parse_request(future)


def test_a_refusal_of_the_library_is_told() -> None:
    with pytest.raises(HandshakeError, match="refuses this kernel: Protocol error"):
        parse_reply(struct.pack("=IiQ", 16, -71, 2))
