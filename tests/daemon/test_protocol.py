"""The control protocol's bytes."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapshotter.daemon import protocol
from snapshotter.daemon.errors import ControlProtocolError

texts = st.text(max_size=40)
requests = st.one_of(
    st.builds(
        protocol.MountRequest,
        reference=texts,
        target=texts,
        platform=texts,
        plain_http=st.booleans(),
        wait_local=st.booleans(),
    ),
    st.builds(protocol.UmountRequest, texts),
    st.builds(protocol.StatusRequest),
    st.builds(protocol.StopRequest),
)


@given(st.lists(requests, max_size=5), st.integers(1, 50))
def test_messages_arrive_whole_however_the_stream_is_cut(
    sent: list[protocol.Request], size: int
) -> None:
    stream = b"".join(map(protocol.encode, sent))
    reader = protocol.request_reader()
    received = []
    for start in range(0, len(stream), size):
        received += reader.feed(stream[start : start + size])
    assert received == sent


@given(st.binary(max_size=200))
def test_other_bytes_are_refused_or_wait_for_more(data: bytes) -> None:
    with suppress(ControlProtocolError):
        assert protocol.request_reader().feed(data) == []


@pytest.mark.parametrize("line", [b"{}", b"[]", b'{"type":"dance"}', b'{"type":"mount"}', b"\xff"])
def test_a_message_that_makes_no_sense_is_refused_with_a_hint(line: bytes) -> None:
    with pytest.raises(ControlProtocolError, match="restart the daemon"):
        protocol.request_reader().feed(line + b"\n")


def test_a_message_without_end_is_refused_before_it_fills_memory() -> None:
    reader = protocol.request_reader()
    assert reader.feed(b"x" * protocol.MAX_MESSAGE) == []
    with pytest.raises(ControlProtocolError, match="exceeds"):
        reader.feed(b"x")


def test_answers_and_requests_of_the_same_name_do_not_mix() -> None:
    status = protocol.Status(pid=1, root="/r", state="/s", mounts=[])
    assert protocol.answer_reader().feed(protocol.encode(status)) == [status]
    asked = protocol.request_reader().feed(protocol.encode(protocol.StatusRequest()))
    assert asked == [protocol.StatusRequest()]


def test_credentials_do_not_show_what_they_are() -> None:
    """A request that fails may get into the log."""
    secret = protocol.HandedCredential(username="me", password="p4ss", identity_token="t0ken")
    shown = repr(protocol.PodmanCredentialsRequest({"a.io/app:1": secret}))
    assert "a.io/app:1" in shown
    assert "p4ss" not in shown
    assert "t0ken" not in shown
