"""Debian's docker-registry as a mirror: another path, TLS, client certificates, and its death."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest
import trio
import trustme

from index.errors import FirstByteError
from snapshotter.registry.platform import Platform
from snapshotter.registry.reading import read_blob
from snapshotter.registry.retry import RetryPolicy
from tests.support.images import push, sample_image
from tests.support.registry import docker_registry

if TYPE_CHECKING:
    from pathlib import Path

    from tests.registry.conftest import CertsD, Opener
    from tests.support.registry import RunningRegistry

AMD64 = Platform("linux", "amd64")


async def test_mirror_below_another_path(
    real_registry: RunningRegistry,
    opener: Opener,
    certs_d: CertsD,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A copy whose API begins at `/copies/v2` gives the image; of what it lacks, the registry."""
    whole, unknown = sample_image(seed=90), sample_image(seed=91)
    registry = real_registry.host
    await push(opener.sink(f"{registry}/mirrored:here"), whole)
    await push(opener.sink(f"{registry}/mirrored:there"), unknown)
    monkeypatch.setenv("REGISTRY_HTTP_PREFIX", "/copies/")
    with docker_registry(tmp_path / "copy") as copy:
        certs_d.write(copy.host, f'server = "http://{copy.host}/copies"')
        await push(certs_d.opener.sink(f"{copy.host}/mirrored:here"), whole)
        certs_d.write(registry, f'[host."http://{copy.host}/copies"]')
        for layer in whole.manifest.layers:
            real_registry.blob_path(layer.digest).unlink()  # so it can come from the copy alone
        for sample, tag in ((whole, "here"), (unknown, "there")):
            source = certs_d.opener.source(f"{registry}/mirrored:{tag}")
            resolved = await source.resolve(AMD64)
            assert resolved.manifest.raw == sample.manifest.raw
            for layer, data in zip(resolved.manifest.layers, sample.layers, strict=True):
                async with source.open_range(layer, 1000, layer.size) as pieces:
                    assert b"".join([piece async for piece in pieces]) == data[1000:]


async def test_mirror_that_wants_to_know_who_we_are(
    real_registry: RunningRegistry,
    opener: Opener,
    certs_d: CertsD,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A mirror with a private CA that takes only clients with a certificate of that CA."""
    ca = trustme.CA()
    directory = certs_d.directory(real_registry.host)
    ca.cert_pem.write_to_path(str(directory / "ca.pem"))
    ca.issue_cert("node.test").private_key_and_cert_chain_pem.write_to_path(
        str(directory / "node.pem")
    )
    monkeypatch.setenv("REGISTRY_HTTP_TLS_CLIENTCAS", f'["{directory}/ca.pem"]')
    sample = sample_image(seed=92)
    with docker_registry(tmp_path / "strict", ca=ca) as strict:
        name = f"{real_registry.host}/strict:v1"
        certs_d.write(
            real_registry.host,
            f'[host."https://{strict.host}"]\nca = "ca.pem"\nclient = "node.pem"',
        )
        await push(certs_d.opener.sink(name), sample)  # a mirror may be pushed to unless told not
        resolved = await certs_d.opener.source(name).resolve(AMD64)
        assert resolved.manifest.raw == sample.manifest.raw
        certs_d.write(real_registry.host, f'[host."https://{strict.host}"]\nca = "ca.pem"')
        with pytest.raises(FirstByteError):
            await certs_d.opener.source(name).resolve(AMD64)
    with pytest.raises(FirstByteError):  # it never was anywhere else
        await opener.source(name).resolve(AMD64)


async def test_mirror_dies_while_a_layer_is_read(
    real_registry: RunningRegistry, opener: Opener, certs_d: CertsD, tmp_path: Path
) -> None:
    """What it had not sent comes from the registry itself; each byte is right, and comes once."""
    sample = sample_image(seed=93, size=40_000_000, layers=1)
    name = f"{real_registry.host}/outlived:v1"
    await push(opener.sink(name), sample)
    layer = sample.manifest.layers[0]
    stored, hidden = real_registry.blob_path(layer.digest), tmp_path / "blob"
    stored.rename(hidden)  # so it can come from the mirror alone, at first
    got = bytearray()
    with ExitStack() as life:
        mortal = life.enter_context(docker_registry(tmp_path / "mortal"))
        await push(opener.sink(f"{mortal.host}/outlived:v1"), sample)
        certs_d.mirror(real_registry.host, mortal.host)
        source = certs_d.opener.source(name)

        async def consume(piece: bytes) -> None:
            got.extend(piece)
            if hidden.exists():
                hidden.rename(stored)
                await trio.to_thread.run_sync(life.close)

        await read_blob(source, layer, consume, RetryPolicy(attempts=2, base=0.001))
    assert bytes(got) == sample.layers[0]
