"""Mirrors that fail in the middle of a layer, or lie about it: the bytes are right all the same."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from index.errors import IntegrityError
from snapshotter.registry.errors import NetworkError
from snapshotter.registry.reading import read_blob
from snapshotter.registry.retry import RetryPolicy
from tests.support.faults import Fault, FaultRegistry
from tests.support.images import read

if TYPE_CHECKING:
    from snapshotter.registry.client import Registry
    from tests.registry.conftest import CertsD
    from tests.support.images import SampleImage


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
