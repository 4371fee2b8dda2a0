"""Mirrors in `hosts.toml` that change while images are in use."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from snapshotter.registry import mirrors
from snapshotter.registry.errors import HostsError
from snapshotter.registry.platform import Platform
from tests.support.faults import FaultRegistry, dead_host
from tests.support.images import read

if TYPE_CHECKING:
    from snapshotter.registry.client import Registry
    from tests.registry.conftest import CertsD
    from tests.support.images import SampleImage

AMD64 = Platform("linux", "amd64")


@pytest.fixture
def looks_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The files are looked at before each request, not once a second."""
    monkeypatch.setattr(mirrors, "LOOK_AGAIN", 0)


async def test_files_are_not_looked_at_for_each_request(
    source: Registry,
    faulty: FaultRegistry,
    mirror: FaultRegistry,
    certs_d: CertsD,
    sample: SampleImage,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A start makes a hundred. An image that is opened meanwhile goes by what is there now."""
    monkeypatch.setattr(mirrors, "LOOK_AGAIN", 3600)
    layer = sample.manifest.layers[0]
    certs_d.write(faulty.host, "")
    await read(source, layer, 0, 10)
    certs_d.mirror(faulty.host, mirror.host)
    await read(source, layer, 0, 10)
    assert mirror.requests == []
    await read(certs_d.opener.source(f"{faulty.host}/team/app:v1"), layer, 0, 10)
    assert len(mirror.requests) == 1


@pytest.mark.usefixtures("looks_each_time")
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


@pytest.mark.usefixtures("looks_each_time")
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
