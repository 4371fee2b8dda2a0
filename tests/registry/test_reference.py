"""References as people type them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from index.errors import FirstByteError, UnsupportedError
from snapshotter.registry.errors import InvalidReferenceError
from snapshotter.registry.reference import Reference

DIGEST = "sha256:" + "0123456789abcdef" * 4


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("python", "docker.io/library/python:latest"),
        ("python:3.12", "docker.io/library/python:3.12"),
        ("me/app", "docker.io/me/app:latest"),
        ("docker.io/python", "docker.io/library/python:latest"),
        ("index.docker.io/me/app", "docker.io/me/app:latest"),
        ("localhost/x", "localhost/x:latest"),
        ("localhost:5000/x", "localhost:5000/x:latest"),
        ("host:5000/x", "host:5000/x:latest"),
        (f"host:5000/x@{DIGEST}", f"host:5000/x@{DIGEST}"),
        (f"quay.io/a/b/c:v1@{DIGEST}", f"quay.io/a/b/c:v1@{DIGEST}"),
        ("[::1]:5000/x:Tag_1", "[::1]:5000/x:Tag_1"),
        ("GHCR.io/a__b/c-d.e", "ghcr.io/a__b/c-d.e:latest"),
        ("127.0.0.1:443/x", "127.0.0.1:443/x:latest"),
    ],
)
def test_full_name(text: str, expected: str) -> None:
    """Short names mean what they mean to docker."""
    assert str(Reference.parse(text)) == expected


@pytest.mark.parametrize(
    "text",
    [
        "", ":", "@", "/", "x:", "x@", "x//y", "/x", "x/", "-x", "x-", "a..b", "x:-tag", "x y",
        "x\n",         "host:5000/", "host:99999/x", "host:0/x", "ho_st.io/x", "x:" + "t" * 129,
        "x@sha256:12", "x@sha256:" + "G" * 64, "x@sha256:" + "A" * 64, "a/" * 130 + "b",
        "0123456789abcdef" * 4, "x@" + DIGEST + "@" + DIGEST, "é", "host.io/x:t:u",
    ],
)  # fmt: skip
def test_malformed(text: str) -> None:
    """What cannot be a reference is refused with a hint."""
    with pytest.raises(InvalidReferenceError) as caught:
        Reference.parse(text)
    assert caught.value.hint


def test_upper_case_hint() -> None:
    """Upper case is the most common slip: the hint is the corrected name."""
    with pytest.raises(InvalidReferenceError, match="me/app") as caught:
        Reference.parse("Me/App:v1")
    assert caught.value.hint.endswith("me/app")


def test_scheme_hint() -> None:
    """A pasted URL is recognised as one."""
    with pytest.raises(InvalidReferenceError, match="leave out"):
        Reference.parse("docker://python:3.12")


def test_sha512() -> None:
    """Another digest algorithm is a matter of support, not a typing error."""
    with pytest.raises(UnsupportedError):
        Reference.parse("x@sha512:" + "0" * 128)


component = st.from_regex(r"[a-z0-9]{1,8}((\.|_|__|-{1,3})[a-z0-9]{1,8}){0,2}", fullmatch=True)
registries = st.sampled_from(
    ["docker.io", "localhost", "localhost:5000", "a.b-c.io:1", "[::1]", "[fe80::1]:80", "10.0.0.1"]
)
tags = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,20}", fullmatch=True)


@given(registries, st.lists(component, min_size=2, max_size=5), tags, st.integers(1, 3))
def test_round_trip(registry: str, path: list[str], tag: str, parts: int) -> None:
    """A reference that was written is read as the same one, with tag, digest, or both."""
    reference = Reference(
        registry, "/".join(path), tag if parts & 1 else None, DIGEST if parts & 2 else None
    )
    assert Reference.parse(str(reference)) == reference


@given(st.text(max_size=80) | st.text(alphabet="aA0.:/@-_[]", max_size=30))
def test_any_text(text: str) -> None:
    """Any text is a reference, whose full name means the same, or a clear error."""
    said = ""
    try:
        reference = Reference.parse(text)
    except FirstByteError as error:
        said = str(error)
    else:
        assert Reference.parse(str(reference)) == reference
    assert "\n" not in said
