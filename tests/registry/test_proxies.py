"""Registries behind a proxy, as the environment names it."""

from __future__ import annotations

import ssl
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest
import trio
import trustme
from hypothesis import given
from hypothesis import strategies as st

from snapshotter.registry.client import Registry
from snapshotter.registry.credentials import CredentialStore
from snapshotter.registry.deadlines import Deadlines
from snapshotter.registry.errors import NetworkError, ProxyError, TlsError
from snapshotter.registry.platform import Platform
from snapshotter.registry.proxies import Proxies, address_of
from snapshotter.registry.transport import Transport
from tests.registry.conftest import Opener
from tests.support.faults import Fault, FaultRegistry, fault_registry
from tests.support.images import SampleImage, push, put, read
from tests.support.proxy import Proxy, running_proxy

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

MORE_THAN_CONNECTIONS = 70
AMD64 = Platform("linux", "amd64")
NAME = "registry.example"
PROXY = "http://proxy.example:3128"
NO_PROXY = (
    "foobar.com, .barbaz.net, *.wildcard.io,port.org:5000, 192.168.1.1, 192.168.1.2:81,"
    "192.168.1.3:80,10.0.0.0/30,fd00::1:1,[fd00::1:2]:443,[fd00::1:3]:80,fd01:0:a::45/64,"
    ",:80, UPPER.NET"
)


# Which proxy


@pytest.mark.parametrize(
    ("environment", "for_http", "for_https"),
    [
        ({}, None, None),
        ({"HTTP_PROXY": PROXY}, PROXY, None),
        ({"HTTPS_PROXY": PROXY}, None, PROXY),
        ({"http_proxy": PROXY, "https_proxy": PROXY}, PROXY, PROXY),
        ({"HTTPS_PROXY": PROXY, "https_proxy": "http://other:1"}, None, PROXY),
        ({"HTTPS_PROXY": "", "https_proxy": PROXY}, None, PROXY),
        ({"HTTPS_PROXY": "proxy.example:3128"}, None, PROXY),
        ({"HTTPS_PROXY": "https://u:p@proxy.example"}, None, "https://u:p@proxy.example"),
        ({"ALL_PROXY": PROXY}, None, None),
        ({"HTTPS_PROXY": PROXY, "NO_PROXY": "*"}, None, None),
        ({"HTTPS_PROXY": PROXY, "no_proxy": f"other,{NAME}"}, None, None),
    ],
)
def test_the_environment_names_one_for_each_scheme(
    environment: dict[str, str], for_http: str | None, for_https: str | None
) -> None:
    proxies = Proxies.of(environment)
    assert proxies.proxy_for(f"http://{NAME}/v2/") == for_http
    assert proxies.proxy_for(f"https://{NAME}/v2/") == for_https


@pytest.mark.parametrize(
    ("host", "through_proxy"),
    [
        ("localhost", False),
        ("127.0.0.1", False),
        ("127.0.0.2:5000", False),
        ("[::1]", False),
        ("registry.localhost", False),
        ("[::2]", True),
        ("localhost.net", True),
        ("192.168.1.1", False),
        ("192.168.1.1:5000", False),
        ("192.168.1.2", True),  # another port
        ("192.168.1.2:81", False),
        ("192.168.1.3", False),
        ("192.168.1.4", True),
        ("10.0.0.2", False),
        ("10.0.0.4", True),
        ("[fd00::1:1]", False),
        ("[fd00::1:2]", True),
        ("[fd00::1:3]", False),
        ("[fd01:0:a::123]", False),
        ("[fe80::1]", True),
        ("barbaz.net", True),
        ("www.barbaz.net", False),
        ("barbarbaz.net", True),
        ("foobar.com", False),
        ("foobar.com:5000", False),
        ("www.foobar.com", False),
        ("foofoobar.com", True),
        ("wildcard.io", True),
        ("nested.wildcard.io", False),
        ("awildcard.io", True),
        ("port.org", True),
        ("port.org:5000", False),
        ("upper.net", False),
        ("UPPER.net", False),
        ("baz.com", True),
    ],
)
def test_no_proxy_means_what_it_means_to_containerd(host: str, *, through_proxy: bool) -> None:
    proxies = Proxies(http=PROXY, no_proxy=NO_PROXY)
    assert proxies.proxy_for(f"http://{host}/v2/") == (PROXY if through_proxy else None)


@given(no_proxy=st.text(alphabet="ab.*:[]/,10 \0é", max_size=30))
def test_nonsense_in_no_proxy_excepts_nobody_else(no_proxy: str) -> None:
    proxies = Proxies(https=PROXY, no_proxy=no_proxy)
    expected = None if "*" in [one.strip() for one in no_proxy.split(",")] else PROXY
    assert proxies.proxy_for("https://registry.example.com/v2/") == expected
    assert proxies.proxy_for("https://127.0.0.1/v2/") is None


@pytest.mark.parametrize(
    ("proxy", "said"),
    [
        ("socks5://proxy.example:1080", "speaks socks5"),
        ("http://", "names no proxy"),
        ("http://proxy.example:99999", "names no proxy"),
        ("http://[::1", "names no proxy"),
    ],
)
def test_a_proxy_that_cannot_be_used_is_not_passed_over(proxy: str, said: str) -> None:
    proxies = Proxies(https=proxy)
    with pytest.raises(ProxyError, match=f"HTTPS_PROXY.*{said}"):
        proxies.proxy_for(f"https://{NAME}/v2/")
    assert proxies.proxy_for("https://localhost/v2/") is None


def test_passwords_are_not_shown() -> None:
    assert address_of("http://user:secret@proxy.example:3128/") == "proxy.example:3128"


# Through it


@pytest.fixture(scope="module")
def ca() -> trustme.CA:
    return trustme.CA()


def server_context(ca: trustme.CA, name: str) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    ca.issue_cert(name).configure_cert(context)
    return context


@pytest.fixture
async def secure(ca: trustme.CA) -> AsyncIterator[FaultRegistry]:
    """A registry with TLS, by the name of NAME, which nobody but the proxy can find."""
    async with fault_registry(server_context(ca, NAME)) as registry:
        yield registry


@pytest.fixture
async def proxy(secure: FaultRegistry, faulty: FaultRegistry) -> AsyncIterator[Proxy]:
    async with running_proxy() as proxy:
        proxy.names = {f"{NAME}:443": secure.host, f"{NAME}:80": faulty.host}
        yield proxy


@asynccontextmanager
async def opening(proxies: Proxies, ca: trustme.CA, folder: Path) -> AsyncIterator[Opener]:
    """Opens images with these proxies. The CA is one that the system trusts."""
    tls = ssl.create_default_context()
    ca.configure_trust(tls)
    waits = Deadlines(connect=5, answer=5, stall=0.3)
    async with Transport(tls=tls, deadlines=waits, proxies=proxies) as transport:
        yield Opener(transport, CredentialStore(folder / "config.json"))


async def pull(opener: Opener, sample: SampleImage, *, plain_http: bool = False) -> None:
    """All of the image, in ranges as a node reads it."""
    repository = opener.repository(f"{NAME}/team/app:v1", plain_http=plain_http)
    source = Registry(repository)
    resolved = await source.resolve(AMD64)
    assert resolved.manifest.raw == sample.manifest.raw
    for layer, data in zip(resolved.manifest.layers, sample.layers, strict=True):
        for start, end in ((0, 1000), (1000, layer.size)):
            assert await read(source, layer, start, end) == data[start:end]


async def test_tls_goes_through_a_tunnel(
    secure: FaultRegistry, proxy: Proxy, ca: trustme.CA, sample: SampleImage, tmp_path: Path
) -> None:
    """The proxy sees a name and nothing else; connections through it are kept."""
    put(secure, "team/app", sample, "v1")
    async with opening(Proxies(https=f"http://{proxy.address}"), ca, tmp_path) as opener:
        await pull(opener, sample)
    assert set(proxy.asked) == {f"CONNECT {NAME}:443"}
    assert len(proxy.asked) < len(secure.requests)


async def test_plain_http_is_passed_on(
    faulty: FaultRegistry, proxy: Proxy, ca: trustme.CA, sample: SampleImage, tmp_path: Path
) -> None:
    put(faulty, "team/app", sample, "v1")
    async with opening(Proxies(http=f"http://{proxy.address}"), ca, tmp_path) as opener:
        await pull(opener, sample, plain_http=True)
    assert f"GET http://{NAME}/v2/team/app/manifests/v1" in proxy.asked
    assert len(proxy.asked) == len(faulty.requests)


async def test_pushes_go_through_it(
    secure: FaultRegistry, proxy: Proxy, ca: trustme.CA, sample: SampleImage, tmp_path: Path
) -> None:
    """Streamed bodies, too."""
    async with opening(Proxies(https=f"http://{proxy.address}"), ca, tmp_path) as opener:
        await push(opener.sink(f"{NAME}/team/app:v1"), sample)
    assert secure.manifests["team/app", "v1"][1] == sample.manifest.raw
    assert set(proxy.asked) == {f"CONNECT {NAME}:443"}


async def test_a_proxy_with_tls_and_a_password(
    secure: FaultRegistry, ca: trustme.CA, sample: SampleImage, tmp_path: Path
) -> None:
    put(secure, "team/app", sample, "v1")
    async with running_proxy(server_context(ca, "127.0.0.1")) as proxy:
        proxy.names = {f"{NAME}:443": secure.host}
        proxy.user = "node:p@ss"
        url = f"https://node:p%40ss@{proxy.address}"
        async with opening(Proxies(https=url), ca, tmp_path) as opener:
            await pull(opener, sample)
    assert secure.asked()
    assert all("proxy-authorization" not in one.headers for one in secure.requests)


async def test_redirects_go_where_they_lead(
    secure: FaultRegistry,
    blob_host: FaultRegistry,
    proxy: Proxy,
    ca: trustme.CA,
    sample: SampleImage,
    tmp_path: Path,
) -> None:
    """Which proxy is asked, or none, is decided for each host: blobs may lie on another one."""
    async with fault_registry(server_context(ca, "127.0.0.1")) as store:
        for registry in (secure, store):
            put(registry, "team/app", sample, "v1")
        digest = sample.manifest.layers[0].digest
        for method in ("GET", "HEAD"):
            headers = (("Location", f"https://{store.host}/v2/team/app/blobs/{digest}"),)
            secure.inject(Fault(status=307, headers=headers), path=digest, method=method)
        async with opening(Proxies(https=f"http://{proxy.address}"), ca, tmp_path) as opener:
            await pull(opener, sample)
        assert store.asked(digest)
    assert set(proxy.asked) == {f"CONNECT {NAME}:443"}


# What goes wrong


@pytest.mark.parametrize("plain_http", [False, True])
async def test_a_proxy_that_wants_a_password_says_so(
    proxy: Proxy, ca: trustme.CA, sample: SampleImage, tmp_path: Path, *, plain_http: bool
) -> None:
    proxy.user = "node:secret"
    url = f"http://node:wrong@{proxy.address}"
    async with opening(Proxies(http=url, https=url), ca, tmp_path) as opener:
        with pytest.raises(ProxyError, match="proxy wants to know who asks") as caught:
            await pull(opener, sample, plain_http=plain_http)
    assert len(proxy.asked) == 1
    assert "USER:PASSWORD" in caught.value.hint
    assert "wrong" not in str(caught.value)


async def test_a_proxy_that_refuses_is_not_asked_again(
    proxy: Proxy, ca: trustme.CA, sample: SampleImage, tmp_path: Path
) -> None:
    proxy.refuses = "403 Filtered"
    async with opening(Proxies(https=f"http://{proxy.address}"), ca, tmp_path) as opener:
        with pytest.raises(ProxyError, match=rf"{NAME}.*{proxy.address}.*refuses \(403 Filtered"):
            await pull(opener, sample)
    assert len(proxy.asked) == 1


async def test_a_proxy_that_is_in_trouble_is_asked_again(
    proxy: Proxy, ca: trustme.CA, tmp_path: Path
) -> None:
    proxy.refuses = "502 Bad Gateway"
    async with opening(Proxies(https=f"http://{proxy.address}"), ca, tmp_path) as opener:
        with pytest.raises(NetworkError, match="does not get through") as caught:
            await opener.source(f"{NAME}/team/app:v1").resolve(AMD64)
    assert caught.value.transient
    assert len(proxy.asked) == 3


async def test_a_proxy_that_is_not_there_is_named(ca: trustme.CA, tmp_path: Path) -> None:
    async with running_proxy() as gone:
        address = gone.address
    async with opening(Proxies(https=f"http://u:secret@{address}"), ca, tmp_path) as opener:
        with pytest.raises(NetworkError, match=f"through the proxy {address}") as caught:
            await opener.source(f"{NAME}/team/app:v1").resolve(AMD64)
    assert "secret" not in str(caught.value)


@asynccontextmanager
async def silent_server() -> AsyncIterator[tuple[str, trio.MemoryReceiveChannel[bytes]]]:
    """Its address, and what it is sent and never answers."""
    put, taken = trio.open_memory_channel[bytes](0)

    async def serve(stream: trio.SocketStream) -> None:
        async with stream:
            await put.send(await stream.receive_some())
            await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, serve, listeners)
        yield f"127.0.0.1:{listeners[0].socket.getsockname()[1]}", taken
        nursery.cancel_scope.cancel()


async def test_tunnels_that_fail_take_no_connections_away(
    secure: FaultRegistry, proxy: Proxy, ca: trustme.CA, sample: SampleImage, tmp_path: Path
) -> None:
    """More of them than there may be connections at once: certificates that are not trusted, and
    readers that give up while TLS begins."""
    put(secure, "team/app", sample, "v1")
    async with (
        opening(Proxies(https=f"http://{proxy.address}"), ca, tmp_path) as opener,
        fault_registry(server_context(trustme.CA(), NAME)) as impostor,
    ):
        proxy.names[f"{NAME}:443"] = impostor.host
        for _ in range(MORE_THAN_CONNECTIONS):
            with pytest.raises(TlsError):
                await opener.source(f"{NAME}/team/app:v1").resolve(AMD64)
        async with silent_server() as (address, asked):
            proxy.names[f"{NAME}:443"] = address
            for _ in range(MORE_THAN_CONNECTIONS):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(opener.source(f"{NAME}/team/app:v1").resolve, AMD64)
                    await asked.receive()
                    nursery.cancel_scope.cancel()
        proxy.names[f"{NAME}:443"] = secure.host
        await pull(opener, sample)
