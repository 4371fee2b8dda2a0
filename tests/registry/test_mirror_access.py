"""What mirrors are told and shown: credentials, headers, paths, certificates."""

from __future__ import annotations

import base64
import json
import ssl
from typing import TYPE_CHECKING

import pytest
import trio
import trustme

from snapshotter.registry.deadlines import Deadlines
from snapshotter.registry.errors import (
    NetworkError,
    RegistryError,
)
from snapshotter.registry.hosts_tree import HostsTree
from snapshotter.registry.platform import Platform
from snapshotter.registry.transport import Transport
from tests.registry.conftest import Opener
from tests.support.faults import Fault, FaultRegistry, fault_registry
from tests.support.images import put, read

if TYPE_CHECKING:
    from pathlib import Path

    from snapshotter.registry.client import Registry
    from snapshotter.registry.credentials import CredentialStore
    from tests.registry.conftest import CertsD
    from tests.support.images import SampleImage

AMD64 = Platform("linux", "amd64")


# Credentials, headers, paths


def log_in(directory: Path, *hosts: str) -> None:
    """Each host has a user and password of its own: its name, twice."""
    auths = {
        host: {"auth": base64.b64encode(f"{_user(host)}:{host}".encode()).decode()}
        for host in hosts
    }
    (directory / "config.json").write_text(json.dumps({"auths": auths}))


def _user(host: str) -> str:
    return host.replace(":", "-")


@pytest.mark.parametrize("tokens", [False, True])
async def test_credentials_stay_apart(
    source: Registry,
    faulty: FaultRegistry,
    mirror: FaultRegistry,
    sample: SampleImage,
    tmp_path: Path,
    tokens: bool,
) -> None:
    """A mirror gets the credentials that are filed under its own name, the registry its own."""
    log_in(tmp_path, faulty.host, mirror.host)
    for host in (faulty, mirror):
        host.users[_user(host.host)] = host.host
        host.token_realm = f"http://{host.host}/token" if tokens else None
    layer, data = sample.manifest.layers[0], sample.layers[0]
    assert await read(source, layer, 0, 10) == data[:10]
    assert faulty.requests == []
    mirror.inject(Fault(status=500), path="/blobs/")
    assert await read(source, layer, 0, 10) == data[:10]
    for host, other in ((faulty, mirror), (mirror, faulty)):
        foreign = base64.b64encode(f"{_user(other.host)}:{other.host}".encode()).decode()
        assert all(
            foreign not in request.headers.get("authorization", "") for request in host.requests
        )


async def test_registrys_credentials_never_go_to_a_mirror(
    source: Registry,
    faulty: FaultRegistry,
    mirror: FaultRegistry,
    sample: SampleImage,
    tmp_path: Path,
) -> None:
    """A mirror that wants a login and has none on file gets nothing, not the registry's."""
    log_in(tmp_path, faulty.host)
    for host in (faulty, mirror):
        host.users[_user(faulty.host)] = faulty.host
    assert await source.resolve(AMD64)
    assert mirror.requests
    assert all("authorization" not in request.headers for request in mirror.requests)


async def test_headers_of_a_host(
    source: Registry, faulty: FaultRegistry, mirror: FaultRegistry, certs_d: CertsD
) -> None:
    """Headers go to their own host alone, may be lists, and replace what is not ours to say."""
    certs_d.write(
        faulty.host,
        f"""
        header.X-Origin = "1"
        [host."http://{mirror.host}".header]
        X-Dragonfly-Registry = "https://registry.test"
        x-list = ["a", "b"]
        authorization = "Basic bWlycm9yOnB3"
        user-agent = "me"
        accept = "text/html"
        """,
    )
    mirror.users["mirror"] = "pw"
    mirror.inject(Fault(status=404), path="/blobs/")
    await source.resolve(AMD64)
    sent = mirror.requests[0].headers
    assert sent["x-dragonfly-registry"] == "https://registry.test"
    assert sent["x-list"] == "a, b"
    assert sent["user-agent"] == "me"
    assert "text/html" not in sent["accept"]
    assert "x-origin" not in sent
    (blob,) = faulty.requests
    assert blob.headers["x-origin"] == "1"
    assert not {"x-list", "x-dragonfly-registry", "authorization"} & blob.headers.keys()


@pytest.mark.parametrize(
    ("path", "override", "root"),
    [("", False, "/v2"), ("/proxy", False, "/proxy/v2"), ("/v2/cache", True, "/v2/cache")],
)
async def test_path_of_a_mirror(
    source: Registry,
    faulty: FaultRegistry,
    mirror: FaultRegistry,
    certs_d: CertsD,
    path: str,
    override: bool,
    root: str,
) -> None:
    """A mirror's API begins where its URL says."""
    certs_d.write(
        faulty.host,
        f'[host."http://{mirror.host}{path}"]\noverride_path = {str(override).lower()}',
    )
    mirror.root = root
    await source.resolve(AMD64)
    assert mirror.requests[0].path == f"{root}/team/app/manifests/v1"
    assert faulty.requests == []


async def test_dial_timeout(certs_d: CertsD, credentials: CredentialStore) -> None:
    """A host that takes no connections is given up after its own time, however patient we are."""
    with trio.socket.socket() as full, trio.socket.socket() as first:
        await full.bind(("127.0.0.1", 0))
        full.listen(0)
        await first.connect(full.getsockname())  # fills the backlog: the next waits
        host = f"127.0.0.1:{full.getsockname()[1]}"
        certs_d.write(host, 'dial_timeout = "50ms"')
        async with Transport(deadlines=Deadlines(connect=10_000)) as transport:
            patient = Opener(transport, credentials, HostsTree(certs_d.root))
            with pytest.raises(NetworkError, match="does not answer in time"):
                await patient.source(f"{host}/team/app:v1").fetch_root()


# TLS


@pytest.fixture
def ca() -> trustme.CA:
    return trustme.CA()


def server_context(ca: trustme.CA, *, clients: trustme.CA | None = None) -> ssl.SSLContext:
    """A server's certificate; with `clients`, one of theirs is wanted, too."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    ca.issue_cert("127.0.0.1").configure_cert(context)
    if clients is not None:
        clients.configure_trust(context)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


async def test_mirror_with_a_ca_of_its_own(
    source: Registry, faulty: FaultRegistry, certs_d: CertsD, sample: SampleImage, ca: trustme.CA
) -> None:
    """Its CA makes a mirror trusted; without it, it is left like any other that fails."""
    ca.cert_pem.write_to_path(str(certs_d.directory(faulty.host) / "ca.pem"))
    async with fault_registry(server_context(ca)) as secure:
        put(secure, "team/app", sample, "v1")
        certs_d.write(faulty.host, f'[host."https://{secure.host}"]')
        await source.fetch_root()
        assert secure.requests == []
        certs_d.write(faulty.host, f'[host."https://{secure.host}"]\nca = "ca.pem"')
        faulty.inject(Fault(status=500))
        assert (await source.resolve(AMD64)).manifest.raw == sample.manifest.raw
        assert len(secure.requests) == 2


async def test_mirror_that_is_not_verified(
    faulty: FaultRegistry, certs_d: CertsD, sample: SampleImage, ca: trustme.CA
) -> None:
    """`skip_verify` is for its host alone."""
    async with (
        fault_registry(server_context(ca)) as trusted,
        fault_registry(server_context(ca)) as untrusted,
    ):
        for host in (trusted, untrusted, faulty):
            put(host, "team/app", sample, "v1")
        certs_d.write(
            faulty.host,
            f'[host."https://{untrusted.host}"]\n[host."https://{trusted.host}"]\n'
            "skip_verify = true",
        )
        await certs_d.opener.source(f"{faulty.host}/team/app:v1").fetch_root()
        assert untrusted.requests == faulty.requests == []
        assert len(trusted.requests) == 1


async def test_client_certificates(
    faulty: FaultRegistry,
    blob_host: FaultRegistry,
    certs_d: CertsD,
    sample: SampleImage,
    ca: trustme.CA,
) -> None:
    """A mirror that wants a certificate gets that which is meant for it. Where it sends us, its CA
    is trusted, but the certificate is not shown."""
    directory = certs_d.directory(faulty.host)
    ca.cert_pem.write_to_path(str(directory / "ca.pem"))
    client = ca.issue_cert("node.test")
    client.private_key_pem.write_to_path(str(directory / "client.key"))
    client.cert_chain_pems[0].write_to_path(str(directory / "client.cert"))
    put(faulty, "team/app", sample, "v1")
    layer = sample.manifest.layers[0]
    async with (
        fault_registry(server_context(ca, clients=ca)) as strict,
        fault_registry(server_context(ca)) as blobs,
        fault_registry(server_context(ca, clients=ca)) as curious,
    ):
        put(strict, "team/app", sample, "v1")
        certs_d.write(
            faulty.host,
            f'[host."https://{strict.host}"]\nca = "ca.pem"\n'
            'client = [["client.cert", "client.key"]]',
        )
        source = certs_d.opener.source(f"{faulty.host}/team/app:v1")
        await source.fetch_root()
        assert len(strict.requests) == 1
        assert faulty.requests == []
        for target, arrived in ((blobs, 1), (curious, 0)):
            put(target, "team/app", sample)
            location = f"https://{target.host}/v2/team/app/blobs/{layer.digest}"
            strict.heal()
            strict.inject(Fault(status=307, headers=(("Location", location),)), path="/blobs/")
            fresh = certs_d.opener.source(f"{faulty.host}/team/app:v1")
            assert await read(fresh, layer, 0, 10) == sample.layers[0][:10]
            assert len(target.requests) == arrived
    assert len(faulty.requests) == 1


async def test_dockers_certificates(certs_d: CertsD, sample: SampleImage, ca: trustme.CA) -> None:
    """A directory of certificates without a hosts.toml is about the registry itself."""
    async with fault_registry(server_context(ca, clients=ca)) as secure:
        put(secure, "team/app", sample, "v1")
        directory = certs_d.directory(secure.host)
        source = certs_d.opener.source(f"{secure.host}/team/app:v1")
        with pytest.raises(RegistryError):
            await source.fetch_root()
        ca.cert_pem.write_to_path(str(directory / "ca.crt"))
        client = ca.issue_cert("node.test")
        client.private_key_and_cert_chain_pem.write_to_path(str(directory / "node.cert"))
        await source.fetch_root()
        assert secure.requests[-1].query == {}


async def test_connections_of_many_kinds(mirror: FaultRegistry, transport: Transport) -> None:
    """However many ways to connect there were, few connections are kept; one in use stays."""
    digest = mirror.add_blob(bytes(1_000_000))
    url = f"http://{mirror.host}/v2/a/blobs/{digest}"
    async with await transport.open("GET", url, [], dial_timeout=100) as response:
        for number in range(40):
            async with await transport.open("HEAD", url, [], dial_timeout=10 + number):
                pass
        assert await response.read(1_000_000) == bytes(1_000_000)
    assert mirror.most_connections <= 20
