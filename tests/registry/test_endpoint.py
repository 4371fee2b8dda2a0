"""Where registries are, and where credentials may go."""

from __future__ import annotations

import pytest

from snapshotter.registry.endpoint import Endpoint, endpoint_of


@pytest.mark.parametrize(
    ("registry", "base"),
    [
        ("docker.io", "https://registry-1.docker.io/v2/"),
        ("ghcr.io", "https://ghcr.io/v2/"),
        ("host:5000", "https://host:5000/v2/"),
        ("localhost", "http://localhost/v2/"),
        ("localhost:5000", "http://localhost:5000/v2/"),
        ("127.0.0.1:5000", "http://127.0.0.1:5000/v2/"),
        ("127.9.9.9", "http://127.9.9.9/v2/"),
        ("[::1]:5000", "http://[::1]:5000/v2/"),
        ("127.0.0.1.example", "https://127.0.0.1.example/v2/"),
        ("10.0.0.1", "https://10.0.0.1/v2/"),
    ],
)
def test_scheme_and_host(registry: str, base: str) -> None:
    """Loopback is plain HTTP, all else is TLS; docker.io has a host of another name."""
    assert endpoint_of(registry).base == base


def test_plain_http_can_be_said() -> None:
    """What is said outright goes before the custom."""
    assert endpoint_of("host", plain_http=True).scheme == "http"
    assert endpoint_of("localhost", plain_http=False).scheme == "https"


@pytest.mark.parametrize(
    ("url", "same"),
    [
        ("https://a.io/v2/x", True),
        ("https://A.IO:443/other", True),
        ("http://a.io/v2/x", False),
        ("https://a.io:444/v2/x", False),
        ("https://b.a.io/v2/x", False),
        ("https://a.io.evil.example/", False),
        ("https://a.io@evil.example/", False),
    ],
)
def test_origin(url: str, same: bool) -> None:
    """Credentials may go to the same scheme, host and port only."""
    assert Endpoint("https", "a.io").is_origin_of(url) is same
