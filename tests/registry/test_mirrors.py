"""Mirrors that work, fail, lie and come back: who is asked what, and that the bytes are right."""

from __future__ import annotations

import logging
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest
import trio

from index.errors import IntegrityError
from snapshotter.fetch.scheduler import Patience
from snapshotter.registry.deadlines import Deadlines
from snapshotter.registry.errors import (
    HostsError,
    NetworkError,
    NotFoundError,
    ServerError,
    UnauthorizedError,
)
from snapshotter.registry.health import REST, Health
from snapshotter.registry.hosts_tree import HostsTree
from snapshotter.registry.manifest import EMPTY_DESCRIPTOR, EMPTY_JSON, Manifest
from snapshotter.registry.platform import Platform
from snapshotter.registry.reading import read_blob
from snapshotter.registry.retry import RetryPolicy
from snapshotter.registry.transport import Transport
from tests.registry.conftest import Opener
from tests.support.faults import Fault, FaultRegistry, fault_registry
from tests.support.images import push, put, read

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from trio.testing import MockClock

    from snapshotter.registry.client import Registry
    from snapshotter.registry.credentials import CredentialStore
    from tests.registry.conftest import CertsD
    from tests.support.images import SampleImage

AMD64 = Platform("linux", "amd64")


@asynccontextmanager
async def dead_host() -> AsyncIterator[str]:
    """A host and port where nobody listens, which nobody else gets meanwhile."""
    with trio.socket.socket() as reserved:
        await reserved.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{reserved.getsockname()[1]}"


# Whom to ask


async def test_mirror_is_asked_for_everything(
    source: Registry, faulty: FaultRegistry, mirror: FaultRegistry, sample: SampleImage
) -> None:
    """Tag, configuration and ranges come from the mirror, which is told whose they are; the
    registry itself is not asked at all."""
    resolved = await source.resolve(AMD64)
    assert resolved.manifest.raw == sample.manifest.raw
    layer = sample.manifest.layers[0]
    assert await read(source, layer, 5, 500_000) == sample.layers[0][5:500_000]
    assert len(mirror.requests) == 3
    assert all(request.query == {"ns": [faulty.host]} for request in mirror.requests)
    assert faulty.requests == []


async def test_docker_hub_by_its_reference_name(
    mirror: FaultRegistry, certs_d: CertsD, sample: SampleImage
) -> None:
    """`docker.io` is called so, and not by its server's name."""
    certs_d.write("docker.io", f'server = "http://{mirror.host}"')
    put(mirror, "library/app", sample, "latest")
    resolved = await certs_d.opener.source("app").resolve(AMD64)
    assert resolved.manifest.raw == sample.manifest.raw
    assert {request.query["ns"][0] for request in mirror.requests} == {"docker.io"}


async def test_default_for_all_registries(
    mirror: FaultRegistry, certs_d: CertsD, sample: SampleImage
) -> None:
    """`_default` is for whatever has no directory of its own."""
    certs_d.mirror("_default", mirror.host)
    for registry in ("ghcr.io", "registry.test:5000"):
        put(mirror, "team/app", sample, "v1")
        await certs_d.opener.source(f"{registry}/team/app:v1").resolve(AMD64)
        assert mirror.requests[-1].query["ns"] == [registry]


async def test_registry_itself_is_no_mirror(
    faulty: FaultRegistry, certs_d: CertsD, sample: SampleImage
) -> None:
    """The registry's own host, though written down, is not told who it is."""
    certs_d.write(faulty.host, f'server = "http://{faulty.host}"')
    put(faulty, "team/app", sample, "v1")
    await certs_d.opener.source(f"{faulty.host}/team/app:v1").resolve(AMD64)
    assert all(request.query == {} for request in faulty.requests)


async def test_mirror_that_is_not_trusted_with_tags(
    source: Registry,
    faulty: FaultRegistry,
    mirror: FaultRegistry,
    certs_d: CertsD,
    sample: SampleImage,
) -> None:
    """With `pull` alone a mirror gives what has a digest; it is not asked for tags or referrers."""
    certs_d.write(faulty.host, f'[host."http://{mirror.host}"]\ncapabilities = ["pull"]')
    await source.resolve(AMD64)
    await source.referrers(sample.manifest.descriptor.digest, "application/x")
    assert mirror.asked("/manifests/") == []
    assert mirror.asked("/referrers/") == []
    assert len(mirror.asked("/blobs/")) == 1
    assert len(faulty.asked("/manifests/v1")) == 1
    assert faulty.asked("/blobs/") == []


async def test_nobody_may(
    source: Registry, faulty: FaultRegistry, certs_d: CertsD, sample: SampleImage
) -> None:
    """If no host may do a thing, the error says which thing."""
    certs_d.write(faulty.host, f'server = "http://{faulty.host}"\ncapabilities = ["resolve"]')
    with pytest.raises(HostsError, match="may resolve tags"):
        await source.fetch_root()
    with pytest.raises(HostsError, match="may pull"):
        await read(source, sample.manifest.layers[0], 0, 10)
    with pytest.raises(HostsError, match="may push"):
        await push(certs_d.opener.sink(f"{faulty.host}/a:b"), sample)


async def test_push_goes_where_it_may(
    faulty: FaultRegistry, mirror: FaultRegistry, certs_d: CertsD, sample: SampleImage
) -> None:
    """A mirror without `push` is not pushed to, nor looked at."""
    certs_d.write(faulty.host, f'[host."http://{mirror.host}"]\ncapabilities = ["pull", "resolve"]')
    await push(certs_d.opener.sink(f"{faulty.host}/team/app:v1"), sample)
    assert mirror.requests == []
    assert faulty.manifests["team/app", "v1"][1] == sample.manifest.raw


async def test_push_to_a_mirror(
    faulty: FaultRegistry, mirror: FaultRegistry, certs_d: CertsD, sample: SampleImage
) -> None:
    """As in containerd, the first host that may be pushed to gets all of it, and there alone it
    is tried again."""
    certs_d.mirror(faulty.host, mirror.host)
    mirror.inject(Fault(status=500), method="PUT", times=1)
    await push(certs_d.opener.sink(f"{faulty.host}/team/app:v1"), sample)
    assert faulty.requests == []
    assert mirror.manifests["team/app", "v1"][1] == sample.manifest.raw
    assert all(request.query["ns"] == [faulty.host] for request in mirror.asked(method="POST"))


# Mirrors that fail


@pytest.mark.parametrize(
    "fault",
    [
        Fault(status=500),
        Fault(status=503, headers=(("Retry-After", "7"),)),
        Fault(status=429),
        Fault(status=401),
        Fault(status=403),
        Fault(status=404),
        Fault(status=418),
        Fault(status=307, headers=(("Location", "ftp://x/"),)),
        Fault(cut=0),
        Fault(stall=0),
        Fault(flip=0),
        Fault(shorten=1),
        Fault(headers=(("Content-Encoding", "gzip"),)),
    ],
)
async def test_failing_mirror_has_one_attempt(
    source: Registry, faulty: FaultRegistry, mirror: FaultRegistry, fault: Fault
) -> None:
    """However a mirror fails, it is left after one attempt at most for each thing it is asked."""
    mirror.inject(fault)
    config = (await source.resolve(AMD64)).manifest.config
    assert len(mirror.requests) <= 2  # manifest, configuration
    assert len(faulty.requests) == 2
    asked = len(mirror.requests)
    await source.fetch_blob(config, max_size=config.size)
    assert len(mirror.requests) == asked


@pytest.mark.parametrize(
    ("fault", "attempts"),
    [
        (Fault(status=500), 1),
        (Fault(status=429), 1),
        (Fault(status=401), 1),
        (Fault(status=404), 2),
    ],
)
async def test_what_a_failure_is_about(
    source: Registry,
    mirror: FaultRegistry,
    sample: SampleImage,
    fault: Fault,
    attempts: int,
) -> None:
    """A mirror that does not answer, or knows us not, is left alone; one that lacks a blob is asked
    for others, but not for that one again."""
    mirror.inject(fault)
    for layer, data in zip(sample.manifest.layers, sample.layers, strict=True):
        for start in (0, 1000, 2000):
            assert await read(source, layer, start, start + 10) == data[start : start + 10]
    assert len(mirror.requests) == attempts


async def test_dead_mirror(
    faulty: FaultRegistry, certs_d: CertsD, sample: SampleImage, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody listens there: the registry itself answers, and the log says it once."""
    put(faulty, "team/app", sample, "v1")
    async with dead_host() as dead:
        certs_d.mirror(faulty.host, dead)
        source = certs_d.opener.source(f"{faulty.host}/team/app:v1")
        with caplog.at_level(logging.WARNING):
            resolved = await source.resolve(AMD64)
            await read(source, sample.manifest.layers[0], 0, 10)
    assert resolved.manifest.raw == sample.manifest.raw
    (record,) = caplog.records
    assert f"http://{dead}/v2/" in record.message
    assert "asked last" in record.message


async def test_mirror_that_hangs(
    source: Registry,
    faulty: FaultRegistry,
    mirror: FaultRegistry,
    certs_d: CertsD,
    credentials: CredentialStore,
) -> None:
    """A mirror that takes a request and says nothing costs one wait."""
    mirror.inject(Fault(gate=trio.Event()))
    async with Transport(deadlines=Deadlines(connect=5, answer=1)) as transport:
        impatient = Opener(transport, credentials, HostsTree(certs_d.root))
        await impatient.source(f"{faulty.host}/team/app:v1").resolve(AMD64)
    assert len(mirror.requests) == 1


def test_hurry() -> None:
    """Two mirrors that hang leave time for a third host, before the fetch scheduler gives up."""
    hurried = Deadlines().hurried()
    assert 2 * (hurried.connect + hurried.answer) <= Patience().source
    assert Deadlines(connect=1, answer=2, stall=3).hurried() == Deadlines(1, 2, 3)


async def test_one_repositorys_failure_helps_all(
    source: Registry,
    faulty: FaultRegistry,
    mirror: FaultRegistry,
    certs_d: CertsD,
    sample: SampleImage,
) -> None:
    """That a mirror does not answer is known to every image of every registry at once."""
    mirror.inject(Fault(status=503))
    await source.fetch_root()
    put(faulty, "other", sample, "v1")
    await certs_d.opener.source(f"{faulty.host}/other:v1").fetch_root()
    assert len(mirror.requests) == 1


async def test_second_mirror(
    source: Registry,
    faulty: FaultRegistry,
    mirror: FaultRegistry,
    certs_d: CertsD,
    sample: SampleImage,
) -> None:
    """Mirrors are tried in the order of the file, before the registry itself."""
    async with fault_registry() as second:
        put(second, "team/app", sample, "v1")
        certs_d.mirror(faulty.host, mirror.host, second.host)
        mirror.inject(Fault(status=404))
        await source.resolve(AMD64)
        assert [r.path for r in mirror.requests] == [r.path for r in second.requests]
    assert faulty.requests == []


async def test_mirror_that_is_back(
    source: Registry, mirror: FaultRegistry, sample: SampleImage, transport: Transport
) -> None:
    """When it has rested, a mirror is asked again."""
    layer, data = sample.manifest.layers[0], sample.layers[0]
    mirror.inject(Fault(status=500))
    assert await read(source, layer, 0, 10) == data[:10]
    mirror.heal()
    transport.health.wake(f"http://{mirror.host}/v2/")  # as time does
    assert await read(source, layer, 10, 20) == data[10:20]
    assert len(mirror.requests) == 2


async def test_rest(mock_clock: MockClock) -> None:
    """Rest ends by itself, and by an answer; it does not get shorter."""
    health = Health()
    assert health.rest("a")
    assert not health.rest("a", seconds=1)
    mock_clock.jump(REST - 1)
    assert health.rests("a")
    mock_clock.jump(1)
    assert not health.rests("a")
    assert health.rest("a")
    health.wake("a")
    assert not health.rests("a")


# When everybody fails


async def test_all_fail(
    source: Registry, faulty: FaultRegistry, mirror: FaultRegistry, sample: SampleImage
) -> None:
    """The registry's own error is the one reported, after its attempts, not the mirror's."""
    mirror.inject(Fault(status=503))
    faulty.inject(Fault(status=404))
    with pytest.raises(NotFoundError):
        await source.resolve(AMD64)
    assert len(faulty.requests) == 1
    assert len(mirror.requests) == 1


async def test_resting_mirror_is_asked_last(
    source: Registry, faulty: FaultRegistry, mirror: FaultRegistry, sample: SampleImage
) -> None:
    """A mirror that rests is asked nevertheless, when the registry itself does not answer."""
    layer, data = sample.manifest.layers[0], sample.layers[0]
    mirror.inject(Fault(status=500), times=1)
    assert await read(source, layer, 0, 10) == data[:10]
    faulty.inject(Fault(status=500))
    assert await read(source, layer, 10, 20) == data[10:20]
    await source.fetch_root()


async def test_content_may_be_anywhere(
    source: Registry, faulty: FaultRegistry, mirror: FaultRegistry, sample: SampleImage
) -> None:
    """A blob that the registry denies us may be on the mirror that fails just now: worth trying
    again."""
    layer = sample.manifest.layers[0]
    mirror.inject(Fault(status=500), times=1)
    faulty.inject(Fault(status=401))
    with pytest.raises(UnauthorizedError) as caught:
        await read(source, layer, 0, 10)
    assert caught.value.transient
    assert await read(source, layer, 0, 10) == sample.layers[0][:10]


async def test_failure_is_no_answer(
    source: Registry, faulty: FaultRegistry, mirror: FaultRegistry, sample: SampleImage
) -> None:
    """When everybody has failed and one recovers, the next read succeeds."""
    layer = sample.manifest.layers[0]
    for broken in (faulty, mirror):
        broken.inject(Fault(status=500))
    for _ in range(2):
        with pytest.raises(ServerError):
            await read(source, layer, 0, 10)
    for healed in (mirror, faulty):
        mirror.heal()
        faulty.heal()
        (faulty if healed is mirror else mirror).inject(Fault(status=500))
        assert await read(source, layer, 0, 10) == sample.layers[0][:10]


# Ranges


@pytest.mark.parametrize("fault", [Fault(cut=100_000), Fault(stall=100_000), Fault(shorten=300)])
async def test_failure_in_mid_body(
    source: Registry,
    faulty: FaultRegistry,
    mirror: FaultRegistry,
    sample: SampleImage,
    fault: Fault,
) -> None:
    """A mirror that dies half-way through a range: the attempt fails, and the next one, which goes
    on where it stopped, is made with another host. The bytes are the right ones."""
    mirror.inject(fault, path="/blobs/")
    layer, data = sample.manifest.layers[0], sample.layers[0]
    got = bytearray()

    async def consume(piece: bytes) -> None:
        got.extend(piece)

    await read_blob(source, layer, consume, RetryPolicy(attempts=2, base=0.001))
    assert bytes(got) == data
    assert len(mirror.requests) == 1
    (rest,) = faulty.requests
    assert rest.headers["range"] == f"bytes={mirror.requests[0].sent}-{layer.size - 1}"


async def test_a_readers_own_failure_is_nobodys_fault(
    source: Registry, faulty: FaultRegistry, mirror: FaultRegistry, sample: SampleImage
) -> None:
    """What goes wrong with whoever reads a range says nothing about the host it came from."""
    layer = sample.manifest.layers[0]

    async def consume(piece: bytes) -> None:
        raise NetworkError("elsewhere")

    with pytest.raises(NetworkError, match="elsewhere"):
        await read_blob(source, layer, consume, RetryPolicy(attempts=1))
    await read(source, layer, 0, 10)
    assert len(mirror.requests) == 2
    assert faulty.requests == []


async def test_wrong_bytes(
    source: Registry, faulty: FaultRegistry, mirror: FaultRegistry, sample: SampleImage
) -> None:
    """A whole blob is checked here, and had from the next host; only the reader knows that a range
    was wrong: when it says so, it gets the next from the registry itself."""
    layer, data = sample.manifest.layers[0], sample.layers[0]
    mirror.inject(Fault(flip=3), path="/blobs/")
    assert await source.fetch_blob(layer, max_size=layer.size) == data
    other, other_data = sample.manifest.layers[1], sample.layers[1]
    assert await read(source, other, 0, 10) != other_data[:10]
    source.doubt(other)
    assert await read(source, other, 0, 10) == other_data[:10]
    assert len(mirror.requests) == len(faulty.requests) == 2


async def test_wrong_bytes_everywhere(
    source: Registry, faulty: FaultRegistry, mirror: FaultRegistry, sample: SampleImage
) -> None:
    """If nobody has the right bytes, there are none."""
    layer = sample.manifest.layers[0]
    for host in (faulty, mirror):
        host.inject(Fault(flip=3), path="/blobs/")
    with pytest.raises(IntegrityError):
        await source.fetch_blob(layer, max_size=layer.size)
    assert len(mirror.requests) == len(faulty.requests) == 1


async def test_redirects_are_each_hosts_own(
    source: Registry,
    faulty: FaultRegistry,
    mirror: FaultRegistry,
    blob_host: FaultRegistry,
    certs_d: CertsD,
    sample: SampleImage,
) -> None:
    """A mirror's redirect is used again for the mirror, and forgotten with its failure; neither
    the mirror's headers nor its name for the registry go where it leads."""
    certs_d.write(faulty.host, f'[host."http://{mirror.host}"]\nheader.X-Key = "secret"')
    mirror.redirect_blobs_to = blob_host.host
    blob_host.signatures = mirror.signed
    blob_host.blobs.update(sample.blobs)
    layer, data = sample.manifest.layers[0], sample.layers[0]
    for start in (0, 100):
        assert await read(source, layer, start, start + 10) == data[start : start + 10]
    assert len(mirror.requests) == 1
    assert all("x-key" not in request.headers for request in blob_host.requests)
    assert all(request.query.keys() == {"signature"} for request in blob_host.requests)
    blob_host.inject(Fault(status=500), times=1)
    assert await read(source, layer, 7, 9) == data[7:9]
    assert len(faulty.requests) == 1
    assert faulty.requests[0].query == {}


# Referrers


async def test_referrers_that_the_mirror_lacks(
    source: Registry,
    faulty: FaultRegistry,
    mirror: FaultRegistry,
    certs_d: CertsD,
    sample: SampleImage,
) -> None:
    """An empty list from a mirror is not the end; a full one is."""
    kind = "application/x-test"
    subject = sample.manifest.descriptor
    faulty.referrers_api = mirror.referrers_api = True
    artifact = Manifest.build(
        config=EMPTY_DESCRIPTOR, layers=[EMPTY_DESCRIPTOR], subject=subject, artifact_type=kind
    )
    for host in (faulty, mirror):
        host.add_blob(EMPTY_JSON)
        assert [one.digest for one in await source.referrers(subject.digest, kind)] == (
            [] if host is faulty else [artifact.descriptor.digest]
        )
        host.add_manifest("team/app", artifact.raw)
    fresh = certs_d.opener.source(f"{faulty.host}/team/app:v1")
    asked = len(faulty.requests)
    assert len(await fresh.referrers(subject.digest, kind)) == 1
    assert len(faulty.requests) == asked
    assert mirror.asked("/referrers/")[-1].query["ns"] == [faulty.host]


# Changes while we run


async def test_changes_while_an_image_is_in_use(
    source: Registry,
    faulty: FaultRegistry,
    mirror: FaultRegistry,
    certs_d: CertsD,
    sample: SampleImage,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The next read goes by the new file; by the old one if the new one is broken, which a new
    image is told and the log says once."""
    layer, data = sample.manifest.layers[0], sample.layers[0]
    path = certs_d.write(faulty.host, "")
    await read(source, layer, 0, 10)
    assert mirror.requests == []
    certs_d.mirror(faulty.host, mirror.host)
    await read(source, layer, 0, 10)
    assert len(mirror.requests) == len(faulty.requests) == 1
    path.write_text("[")
    for _ in range(2):
        assert await read(source, layer, 0, 10) == data[:10]
    assert len(mirror.requests) == 3
    assert [r.levelname for r in caplog.records if "not valid TOML" in r.message] == ["ERROR"]
    with pytest.raises(HostsError, match="not valid TOML"):
        await certs_d.opener.source(f"{faulty.host}/team/app:v1").resolve(AMD64)


async def test_what_was_learnt_survives_a_change(
    source: Registry, faulty: FaultRegistry, mirror: FaultRegistry, certs_d: CertsD
) -> None:
    """A host that stays in the file keeps its tokens."""
    mirror.token_realm = f"http://{mirror.host}/token"
    await source.resolve(AMD64)
    async with dead_host() as dead:
        certs_d.mirror(faulty.host, mirror.host, dead)
        await source.resolve(AMD64)
    assert len(mirror.asked("/token")) == 1
