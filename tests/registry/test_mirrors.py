"""Who is asked for what: mirrors first, as far as they may be, then the registry itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from snapshotter.registry.errors import HostsError
from snapshotter.registry.manifest import EMPTY_DESCRIPTOR, EMPTY_JSON, Manifest
from snapshotter.registry.platform import Platform
from tests.support.faults import Fault, FaultRegistry
from tests.support.images import push, put, read

if TYPE_CHECKING:
    from snapshotter.registry.client import Registry
    from tests.registry.conftest import CertsD
    from tests.support.images import SampleImage

AMD64 = Platform("linux", "amd64")


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
