"""Registries for these tests: a real one, and one that misbehaves."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest

from snapshotter.registry.client import Registry
from snapshotter.registry.credentials import CredentialStore
from snapshotter.registry.deadlines import Deadlines
from snapshotter.registry.hosts_tree import HostsTree
from snapshotter.registry.mirrors import Repository
from snapshotter.registry.push import RegistrySink
from snapshotter.registry.reference import Reference
from snapshotter.registry.retry import RetryPolicy
from snapshotter.registry.transport import Transport
from tests.support.faults import FaultRegistry, fault_registry
from tests.support.images import SampleImage, put, sample_image
from tests.support.registry import RunningRegistry, docker_registry

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

QUICK = RetryPolicy(attempts=3, base=0.001)


@pytest.fixture(scope="session")
def real_registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningRegistry]:
    """One docker-registry for all tests; each uses a repository of its own."""
    with docker_registry(tmp_path_factory.mktemp("registry")) as registry:
        yield registry


@pytest.fixture
async def faulty() -> AsyncIterator[FaultRegistry]:
    """A registry that does what it is told."""
    async with fault_registry() as registry:
        yield registry


@pytest.fixture
async def blob_host() -> AsyncIterator[FaultRegistry]:
    """Another server, for redirects to lead to."""
    async with fault_registry() as registry:
        yield registry


@pytest.fixture
async def transport() -> AsyncIterator[Transport]:
    """Connections that lose patience soon."""
    async with Transport(deadlines=Deadlines(connect=5, answer=5, stall=0.3)) as transport:
        yield transport


@pytest.fixture
def credentials(tmp_path: Path) -> CredentialStore:
    """The credentials in `tmp_path / "config.json"`: none, until a test writes it."""
    return CredentialStore(tmp_path / "config.json")


class Opener:
    """Makes sources and sinks for references, with quick retries."""

    def __init__(
        self, transport: Transport, credentials: CredentialStore, hosts: HostsTree | None = None
    ) -> None:
        self._transport = transport
        self._credentials = credentials
        self._hosts = hosts

    def repository(self, reference: str, *, plain_http: bool | None = None) -> Repository:
        return Repository(
            Reference.parse(reference),
            self._transport,
            self._credentials,
            hosts=self._hosts,
            plain_http=plain_http,
        )

    def source(self, reference: str, policy: RetryPolicy = QUICK) -> Registry:
        return Registry(self.repository(reference), policy=policy)

    def sink(self, reference: str) -> RegistrySink:
        return RegistrySink(self.repository(reference), policy=QUICK)


@pytest.fixture
def opener(transport: Transport, credentials: CredentialStore) -> Opener:
    """Opens images in any registry."""
    return Opener(transport, credentials)


@pytest.fixture
def rng() -> random.Random:
    """Randomness that is the same in each run."""
    return random.Random(20)


class CertsD:
    """A tree of hosts.toml files, and images opened as it says."""

    def __init__(self, root: Path, transport: Transport, credentials: CredentialStore) -> None:
        self.root = root
        self.opener = Opener(transport, credentials, HostsTree(root))

    def directory(self, registry: str) -> Path:
        """Where a registry's hosts are described."""
        name, colon, port = registry.partition(":")
        directory = self.root / (f"{name}_{port}_" if colon else name)
        directory.mkdir(parents=True, exist_ok=True)
        return directory

    def write(self, registry: str, text: str) -> Path:
        """Write a registry's hosts.toml; its path."""
        path = self.directory(registry) / "hosts.toml"
        path.write_text(text)
        return path

    def mirror(self, registry: str, *hosts: str) -> None:
        """Let `hosts`, spoken to over plain HTTP, be all there is said about a registry."""
        self.write(registry, "".join(f'[host."http://{host}"]\n' for host in hosts))


@pytest.fixture
def certs_d(tmp_path: Path, transport: Transport, credentials: CredentialStore) -> CertsD:
    """No registry has hosts of its own until a test writes them."""
    return CertsD(tmp_path / "certs.d", transport, credentials)


@pytest.fixture
async def mirror() -> AsyncIterator[FaultRegistry]:
    """A second registry, to be a mirror of the first."""
    async with fault_registry() as registry:
        yield registry


@pytest.fixture(scope="session")
def sample() -> SampleImage:
    """An image of two layers, for any registry."""
    return sample_image(seed=50, size=600_000)


def serve(registry: FaultRegistry, opener: Opener, sample: SampleImage) -> Registry:
    """The image, put into a registry and opened there."""
    put(registry, "team/app", sample, "v1")
    return opener.source(f"{registry.host}/team/app:v1")


@pytest.fixture
def source(
    faulty: FaultRegistry, mirror: FaultRegistry, certs_d: CertsD, sample: SampleImage
) -> Registry:
    """An image that `faulty`, its registry, and `mirror`, a mirror of that, both have."""
    certs_d.mirror(faulty.host, mirror.host)
    put(mirror, "team/app", sample, "v1")
    return serve(faulty, certs_d.opener, sample)
