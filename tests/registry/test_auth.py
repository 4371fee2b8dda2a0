"""Challenges and tokens, without a network."""

from __future__ import annotations

import json
from urllib.parse import parse_qs, urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapshotter.registry.auth import (
    Challenge,
    IdentityToken,
    Password,
    TokenCache,
    basic,
    parse_challenges,
    parse_token,
    scopes_of,
    token_request,
)
from snapshotter.registry.errors import ProtocolError

REALM = "https://auth.example/token"


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ('Basic realm="x"', [("basic", {"realm": "x"})]),
        ("Basic", [("basic", {})]),
        (
            f'Bearer realm="{REALM}",service="r",scope="repository:a/b:pull,push"',
            [("bearer", {"realm": REALM, "service": "r", "scope": "repository:a/b:pull,push"})],
        ),
        (
            'Negotiate, Basic realm="a, b", Bearer realm=plain , SERVICE = "s"',
            [
                ("negotiate", {}),
                ("basic", {"realm": "a, b"}),
                ("bearer", {"realm": "plain", "service": "s"}),
            ],
        ),
        ("Negotiate YWJj==, Basic realm=x", [("negotiate", {}), ("basic", {"realm": "x"})]),
        (r'Basic realm="say \"hi\", \\"', [("basic", {"realm": 'say "hi", \\'})]),
        ('Basic realm="unclosed', [("basic", {})]),
        ('realm="x"', []),
        ("", []),
        (",,,", []),
    ],
)
def test_challenges(header: str, expected: list[tuple[str, dict[str, str]]]) -> None:
    """Quoted commas, several challenges in one header, and odd spacing are understood."""
    assert parse_challenges([header]) == [Challenge(*each) for each in expected]


def test_challenges_in_several_headers() -> None:
    """Headers are read one by one; nonsense in one does not hide another."""
    found = parse_challenges(["=?", "Basic realm=a", "Bearer realm=b"])
    assert [challenge.scheme for challenge in found] == ["basic", "bearer"]


@given(st.lists(st.text(max_size=60) | st.text(alphabet='aB =,"\\', max_size=40), max_size=3))
def test_any_header(values: list[str]) -> None:
    """Any header is parsed to some challenges without an exception."""
    for challenge in parse_challenges(values):
        assert challenge.scheme == challenge.scheme.lower()


names = st.from_regex(r"[a-z]{1,8}", fullmatch=True)


@given(
    st.lists(
        st.tuples(names, st.dictionaries(names, st.text(alphabet='ab, "\\=', max_size=12))),
        max_size=4,
    )
)
def test_challenges_round_trip(challenges: list[tuple[str, dict[str, str]]]) -> None:
    """What is written by the grammar is read back, several challenges in one header."""

    def quoted(text: str) -> str:
        return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'

    header = ", ".join(
        f"{scheme} " + ", ".join(f"{key}={quoted(value)}" for key, value in parameters.items())
        for scheme, parameters in challenges
    )
    assert parse_challenges([header]) == [Challenge(*each) for each in challenges]


def bearer(**parameters: str) -> Challenge:
    return Challenge("bearer", {"realm": REALM, "service": "r"} | parameters)


def test_anonymous_token_request() -> None:
    """Without credentials: GET, the service and every scope in the query, no Authorization."""
    request = token_request(bearer(realm=f"{REALM}?x=1"), None, ["repository:a:pull", "b"])
    assert request.method == "GET"
    assert parse_qs(urlsplit(request.url).query) == {
        "x": ["1"],
        "service": ["r"],
        "scope": ["repository:a:pull", "b"],
    }
    assert request.headers == {}


def test_token_request_with_password() -> None:
    """A password goes into the header, never into the URL."""
    request = token_request(bearer(), Password("ü", "geheim:"), ["s"])
    assert request.headers["Authorization"] == basic(Password("ü", "geheim:"))
    assert "geheim" not in request.url


def test_token_request_with_identity_token() -> None:
    """An identity token goes into the body of a POST."""
    request = token_request(bearer(), IdentityToken("id&x"), ["s", "t"])
    assert (request.method, request.url) == ("POST", REALM)
    form = parse_qs(request.body.decode())
    assert form["refresh_token"] == ["id&x"]
    assert form["scope"] == ["s t"]
    assert form["grant_type"] == ["refresh_token"]


@pytest.mark.parametrize("realm", ["", "x", "ftp://x/", "file:///etc/passwd", "https:///x"])
def test_realm_that_is_no_url(realm: str) -> None:
    """A challenge that leads nowhere is a ProtocolError."""
    with pytest.raises(ProtocolError):
        token_request(bearer(realm=realm), None, [])


def test_secrets_are_not_shown() -> None:
    """Values that hold secrets keep them out of their text, hence out of logs and tracebacks."""
    assert "geheim" not in repr(Password("me", "geheim")) + repr(IdentityToken("geheim"))


def test_scopes() -> None:
    """Ours first, then what the challenge wants besides, each once."""
    challenge = bearer(scope="repository:a:pull other")
    assert scopes_of(challenge, "repository:a:pull") == ("repository:a:pull", "other")


def test_token_lifetime() -> None:
    """A token is used until shortly before it expires; 60 seconds if it does not say."""
    cache = TokenCache()
    for answer, lifetime in (({"token": "t", "expires_in": 300}, 300), ({"access_token": "t"}, 60)):
        token = parse_token(json.dumps(answer).encode(), now=1000, host="h")
        cache.put(bearer(), ("s",), token)
        assert cache.get(bearer(), ("s",), 1000 + 0.8 * lifetime) == token
        assert cache.get(bearer(), ("s",), 1000 + lifetime) is None
        assert cache.get(bearer(), ("other",), 1000) is None
        assert cache.get(bearer(service="other"), ("s",), 1000) is None
    cache.drop("t")
    assert cache.get(bearer(), ("s",), 1000) is None


@pytest.mark.parametrize(
    "raw",
    [b"", b"{}", b"[]", b'{"token": ""}', b'{"token": 1}', b'{"token": "a\\r\\nb: c"}', b"\xff"],
)
def test_answer_without_token(raw: bytes) -> None:
    """No token, or one that would break out of its header, is a ProtocolError."""
    with pytest.raises(ProtocolError, match=r"^h answers"):
        parse_token(raw, now=0, host="h")
