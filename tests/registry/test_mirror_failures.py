"""Mirrors that fail, hang and come back: who is asked next, who rests, and for how long."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import pytest
import trio

from snapshotter.fetch.scheduler import Patience
from snapshotter.registry.deadlines import Deadlines
from snapshotter.registry.errors import NotFoundError, ServerError, UnauthorizedError
from snapshotter.registry.health import REST, Health
from snapshotter.registry.hosts_tree import HostsTree
from snapshotter.registry.platform import Platform
from snapshotter.registry.transport import Transport
from tests.registry.conftest import Opener
from tests.support.faults import Fault, FaultRegistry, dead_host, fault_registry
from tests.support.images import put, read

if TYPE_CHECKING:
    from trio.testing import MockClock

    from snapshotter.registry.client import Registry
    from snapshotter.registry.credentials import CredentialStore
    from tests.registry.conftest import CertsD
    from tests.support.images import SampleImage

AMD64 = Platform("linux", "amd64")


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
