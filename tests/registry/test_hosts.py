"""A hosts.toml as values: what containerd understands, and clear words about the rest."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapshotter.registry.endpoint import Endpoint
from snapshotter.registry.errors import HostsError
from snapshotter.registry.host import EVERYTHING, Capability
from snapshotter.registry.hosts import (
    HostEntry,
    HostsFile,
    TlsFiles,
    from_certificates,
    parse_duration,
    parse_hosts,
)

PATH = Path("/etc/containerd/certs.d/test/hosts.toml")


def parse(text: str) -> HostsFile:
    return parse_hosts(text.encode(), PATH)


def only_host(text: str) -> HostEntry:
    """The entry of a file with one host, apart from the server's."""
    host, _ = parse(text).hosts
    return host


def test_everything_at_once() -> None:
    """All fields, in the order of the file; the top level is the server, and comes last."""
    found = parse("""
        server = "https://default.test"
        ca = "/etc/path/default"
        [header]
          x-custom-1 = "custom header"

        [host."https://mirror.test"]
          capabilities = ["pull"]
          ca = "mirror.pem"
          skip_verify = false
          [host."https://mirror.test".header]
            x-custom-2 = ["value1", "value2"]

        [host."https://bak.test/us"]
          skip_verify = true

        [host."http://a.test:5000"]
          capabilities = ["Pull", "resolve", "push", "referrers"]
          dial_timeout = "1.5s"

        [host."https://z.test"]
          ca = ["/etc/1.pem", "2.pem"]
          client = [["client.cert", "/etc/client.key"], ["both.pem", ""]]
    """)
    here = PATH.parent
    assert found.warnings == ()
    assert found.hosts == (
        HostEntry(
            Endpoint("https", "mirror.test"),
            Capability.PULL,
            headers=(("x-custom-2", "value1"), ("x-custom-2", "value2")),
            tls=TlsFiles(ca=(here / "mirror.pem",)),
        ),
        HostEntry(Endpoint("https", "bak.test", "/us/v2"), tls=TlsFiles(skip_verify=True)),
        HostEntry(Endpoint("http", "a.test:5000"), EVERYTHING, dial_timeout=1.5),
        HostEntry(
            Endpoint("https", "z.test"),
            tls=TlsFiles(
                ca=(Path("/etc/1.pem"), here / "2.pem"),
                client=((here / "client.cert", Path("/etc/client.key")), (here / "both.pem", None)),
            ),
        ),
        HostEntry(
            Endpoint("https", "default.test"),
            headers=(("x-custom-1", "custom header"),),
            tls=TlsFiles(ca=(Path("/etc/path/default"),)),
        ),
    )


def test_without_server() -> None:
    """The last host is then the registry itself, which has all capabilities whatever is said."""
    assert parse("").hosts == (HostEntry(),)
    assert parse('capabilities = ["pull"]\ndial_timeout = "3s"').hosts == (
        HostEntry(endpoint=None, capabilities=EVERYTHING, dial_timeout=3),
    )


@pytest.mark.parametrize(
    ("url", "override_path", "base"),
    [
        ("https://m.test", False, "https://m.test/v2/"),
        ("https://m.test/", False, "https://m.test/v2/"),
        ("m.test:5000", False, "https://m.test:5000/v2/"),
        ("http://M.test", False, "http://m.test/v2/"),
        ("https://m.test/v2", False, "https://m.test/v2/"),
        ("https://m.test/v2/", False, "https://m.test/v2/"),
        ("https://m.test/cache//a/../docker", False, "https://m.test/cache/docker/v2/"),
        ("https://m.test/v2/docker", False, "https://m.test/v2/docker/v2/"),
        ("https://m.test/v2/docker", True, "https://m.test/v2/docker/"),
        ("https://m.test/", True, "https://m.test/"),
        ("https://m.test", True, "https://m.test/"),
        ("http://[::1]:5000", False, "http://[::1]:5000/v2/"),
        ("https://docker.io", False, "https://registry-1.docker.io/v2/"),
    ],
)
def test_url(url: str, override_path: bool, base: str) -> None:
    """`/v2` is where the API begins, unless the path is said to be; `docker.io` has no API."""
    found = only_host(f'[host."{url}"]\noverride_path = {str(override_path).lower()}')
    assert found.endpoint is not None
    assert found.endpoint.base == base


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("server = ", "hosts.toml is not valid TOML"),
        ("server = 5", "server is not a string"),
        ("host = 5", "host is not a table"),
        ('[host]\n"https://a" = 5', "host https://a: not a table"),
        ('server = "ftp://a"', "'ftp://a' is not an http or https URL"),
        ('server = "https://"', "not an http or https URL"),
        ('server = "https://a:70000"', "is not a URL"),
        ('server = "https://a b"', "not an http or https URL"),
        ('[host."https://a"]\ncapabilities = "pull"', "https://a: capabilities is not a list"),
        ('[host."https://a"]\ncapabilities = ["fly"]', "unknown capability 'fly'"),
        ('[host."https://a"]\ncapabilities = [1]', "unknown capability 1"),
        ("ca = 5", "ca is not a file or a list of files"),
        ("ca = [5]", "ca is not a file or a list of files"),
        ('ca = ""', "'' is not a file"),
        ("client = 5", "client is not a file"),
        ('client = [["a", "b", "c"]]', "client is not a file"),
        ("client = [[]]", "client is not a file"),
        ('skip_verify = "no"', "skip_verify is neither true nor false"),
        ('[host."https://a"]\noverride_path = 1', "override_path is neither true nor false"),
        ('header = "x"', "header is not a table"),
        ("header.x = 1", "malformed value of header x"),
        ('header.x = "a\\r\\nb"', "malformed value of header x"),
        ('header."a b" = "c"', "malformed header name 'a b'"),
        ("dial_timeout = 3", "dial_timeout 3 is not a duration"),
        ('dial_timeout = "3 s"', "dial_timeout '3 s' is not a duration"),
        ('dial_timeout = "-3s"', "is not a duration"),
    ],
)
def test_malformed(text: str, said: str) -> None:
    """An error names the file, where in it, and what is wrong."""
    with pytest.raises(HostsError, match=re.escape(said)) as caught:
        parse(text)
    assert str(caught.value).startswith(str(PATH))


@pytest.mark.parametrize(
    ("text", "warned"),
    [
        ('[host."https://a"]\nproxy = "http://p"', "host https://a: proxy is not known here"),
        ("colour = 1", "colour is not known here, and ignored"),
        ('[host."http://a"]\nskip_verify = true', "http:// is spoken to without it"),
        ('[host."https://u:p@a"]', "only scheme, host and path of the URL are used"),
        ('header.Host = "x"', "header Host cannot be set"),
    ],
)
def test_without_effect(text: str, warned: str) -> None:
    """What has no effect is said, and does no harm."""
    (warning,) = parse(text).warnings
    assert warned in warning
    assert str(PATH) in warning


def test_certificates_by_their_names() -> None:
    """Docker's layout: CAs end in .crt, clients in .cert, with a .key beside it or in it."""
    here = Path("/certs/reg")
    names = ["b.crt", "a.crt", "client.cert", "client.key", "both.cert", "lone.key", "README"]
    assert from_certificates(here, names).hosts == (
        HostEntry(
            tls=TlsFiles(
                ca=(here / "a.crt", here / "b.crt"),
                client=(
                    (here / "both.cert", None),
                    (here / "client.cert", here / "client.key"),
                ),
            )
        ),
    )
    assert from_certificates(here, ["README"]).hosts == (HostEntry(),)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0", 0.0),
        ("3s", 3.0),
        ("+3s", 3.0),
        ("1h15m30.5s", 4530.5),
        (".5s", 0.5),
        ("5.s", 5.0),
        ("200ms", 0.2),
        ("7us", 7e-6),
        ("7µs", 7e-6),
        ("", None),
        ("3", None),
        ("s", None),
        ("-1s", None),
        ("3s ", None),
        ("1d", None),
        (".s", None),
    ],
)
def test_duration(text: str, seconds: float | None) -> None:
    """Durations are Go's."""
    assert parse_duration(text) == (None if seconds is None else pytest.approx(seconds))


@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_any_bytes(raw: bytes) -> None:
    """Whatever is in the file, it is hosts or a HostsError."""
    with suppress(HostsError):
        assert parse_hosts(raw, PATH).hosts


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8) | st.sampled_from(["pull"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=2)
    ),
    max_leaves=6,
)
_FIELDS = st.sampled_from(
    [
        "server", "capabilities", "ca", "client", "skip_verify", "header", "override_path",
        "dial_timeout", "host", "other",
    ]
)  # fmt: skip


@given(st.dictionaries(_FIELDS, _VALUES, max_size=4), st.text(max_size=12))
def test_any_values(fields: dict[str, object], url: str) -> None:
    """Values of any type in any field make no other exception than HostsError."""
    table = "".join(
        f"{key} = {_toml(value)}\n" for key, value in fields.items() if value is not None
    )
    for text in (table, f"[host.{_toml(url)}]\n{table}"):
        with suppress(HostsError):
            parse(text)


def _toml(value: object) -> str:
    match value:
        case bool():
            return str(value).lower()
        case int():
            return str(value)
        case list():
            return f"[{', '.join(_toml(one) for one in value if one is not None)}]"
        case dict():
            pairs = (f"{_toml(key)} = {_toml(one)}" for key, one in value.items())
            return f"{{{', '.join(pairs)}}}"
        case _:
            return '"' + "".join(f"\\U{ord(c):08X}" for c in str(value or "")) + '"'


@given(
    st.lists(
        st.from_regex(r"[a-z0-9]{1,8}(\.[a-z]{2,5})?(:[1-9][0-9]{0,3})?", fullmatch=True),
        unique=True,
        max_size=8,
    )
)
def test_order_of_the_file(names: list[str]) -> None:
    """Hosts come in the order they are written in, the server last."""
    text = "".join(f'[host."https://{name}"]\n' for name in names)
    *mirrors, server = parse(text).hosts
    assert [one.endpoint.host for one in mirrors if one.endpoint] == names
    assert server == HostEntry()
