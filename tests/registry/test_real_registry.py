"""Against Debian's docker-registry, with skopeo as the judge of what was pushed."""

from __future__ import annotations

import base64
import json
import ssl
import subprocess
from typing import TYPE_CHECKING

import pytest
import trustme

from index.errors import IntegrityError
from snapshotter.registry.client import Registry
from snapshotter.registry.errors import NotFoundError, TlsError, UnauthorizedError
from snapshotter.registry.image import body_of
from snapshotter.registry.layout import Layout
from snapshotter.registry.manifest import (
    EMPTY_DESCRIPTOR,
    EMPTY_JSON,
    Descriptor,
    Manifest,
    PlatformFields,
    PlatformList,
)
from snapshotter.registry.mirrors import Repository
from snapshotter.registry.platform import Platform
from snapshotter.registry.push import RegistrySink
from snapshotter.registry.reference import Reference
from snapshotter.registry.retry import RetryPolicy
from snapshotter.registry.transport import Transport
from tests.support.images import digest, push, sample_image
from tests.support.registry import PASSWORD, USERNAME, RunningRegistry, docker_registry

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from snapshotter.registry.credentials import CredentialStore
    from tests.registry.conftest import Opener
    from tests.support.images import SampleImage

AMD64 = Platform("linux", "amd64")
ARTIFACT = "application/vnd.test.artifact"


def skopeo(*arguments: str) -> None:
    subprocess.run(["skopeo", *arguments], check=True, capture_output=True, timeout=60)


async def test_what_we_push_we_pull(real_registry: RunningRegistry, opener: Opener) -> None:
    """An image comes back as it was: manifest, configuration, every byte of every layer."""
    sample = sample_image()
    name = real_registry.reference("roundtrip", "v1")
    await push(opener.sink(name), sample)
    source = opener.source(name)
    resolved = await source.resolve(AMD64)
    assert resolved.manifest.raw == sample.manifest.raw
    assert resolved.descriptor.digest == digest(sample.manifest.raw)
    assert resolved.config.run.cmd == ["/bin/sh"]
    assert resolved.config.run.entrypoint is None
    for layer, data in zip(resolved.manifest.layers, sample.layers, strict=True):
        async with source.open_range(layer, 0, layer.size) as pieces:
            assert b"".join([piece async for piece in pieces]) == data


async def test_ranges(real_registry: RunningRegistry, opener: Opener) -> None:
    """A range gives exactly its bytes: first, last, in the middle, one byte, none."""
    sample = sample_image(seed=1, size=1_000_000)
    name = real_registry.reference("ranges")
    await push(opener.sink(name), sample)
    source = opener.source(name)
    layer, data = sample.manifest.layers[0], sample.layers[0]
    for start, end in ((0, 1), (0, 5000), (777, 700_000), (len(data) - 1, len(data)), (9, 9)):
        async with source.open_range(layer, start, end) as pieces:
            got = [piece async for piece in pieces]
        assert b"".join(got) == data[start:end]
        assert all(len(piece) <= 256 << 10 for piece in got)


async def test_skopeo_pulls_what_we_push(
    real_registry: RunningRegistry, opener: Opener, tmp_path: Path
) -> None:
    """Another tool takes our image, checks its digests, and has the same bytes."""
    sample = sample_image(seed=2)
    name = real_registry.reference("for-skopeo")
    await push(opener.sink(name), sample)
    skopeo("copy", "--src-tls-verify=false", f"docker://{name}", f"oci:{tmp_path}/out:latest")
    resolved = await Layout(tmp_path / "out", "latest").resolve(AMD64)
    assert resolved.manifest.raw == sample.manifest.raw
    for data in sample.layers:
        stored = tmp_path / "out/blobs/sha256" / digest(data).removeprefix("sha256:")
        assert stored.read_bytes() == data


@pytest.mark.parametrize("manifest_format", ["oci", "v2s2"])
async def test_we_pull_what_skopeo_pushes(
    real_registry: RunningRegistry, opener: Opener, tmp_path: Path, manifest_format: str
) -> None:
    """OCI and docker manifests by another tool are read alike, from a layout of ours."""
    sample = sample_image(seed=3)
    await push(Layout(tmp_path / "in", "it"), sample)
    name = real_registry.reference(f"from-skopeo-{manifest_format}")
    skopeo(
        "copy", "--dest-tls-verify=false", "--format", manifest_format,
        f"oci:{tmp_path}/in:it", f"docker://{name}",
    )  # fmt: skip
    source = opener.source(name)
    resolved = await source.resolve(AMD64)
    assert [layer.digest for layer in resolved.manifest.layers] == [
        digest(data) for data in sample.layers
    ]
    first = resolved.manifest.layers[0]
    assert await source.fetch_blob(first, max_size=first.size) == sample.layers[0]


async def test_platform_list(real_registry: RunningRegistry, opener: Opener) -> None:
    """Of a multi-platform image, the one that fits is taken; if none does, all are named."""
    name = real_registry.reference("multi")
    sink = opener.sink(name)
    samples: dict[str, SampleImage] = {}
    entries = []
    for seed, architecture in enumerate(("amd64", "arm64", "s390x")):
        samples[architecture] = sample_image(seed=10 + seed, architecture=architecture)
        await push(sink, samples[architecture], named=False)
        found = samples[architecture].manifest.descriptor
        platform = PlatformFields(architecture=architecture, os="linux")
        entries.append(
            Descriptor(
                media_type=found.media_type,
                digest=found.digest,
                size=found.size,
                platform=platform,
            )
        )
    await sink.write_manifest(PlatformList.build(entries), named=True)
    source = opener.source(name)
    resolved = await source.resolve(Platform("linux", "arm64"))
    assert resolved.manifest.raw == samples["arm64"].manifest.raw
    with pytest.raises(NotFoundError, match="linux/amd64, linux/arm64, linux/s390x"):
        await source.resolve(Platform("linux", "riscv64"))


async def test_blob_whose_digest_only_its_end_tells(
    real_registry: RunningRegistry, opener: Opener
) -> None:
    """A stream of unknown length and digest arrives whole, under the right digest."""

    async def stream() -> AsyncIterator[bytes]:
        for number in range(50):
            yield bytes([number]) * 10_000

    name = real_registry.reference("streamed")
    written = await opener.sink(name).add_blob("application/test", stream())
    expected = b"".join(bytes([number]) * 10_000 for number in range(50))
    assert written.digest == digest(expected)
    assert written.size == len(expected)
    assert await opener.source(name).fetch_blob(written, max_size=len(expected)) == expected


async def test_blob_of_another_digest_is_not_pushed(
    real_registry: RunningRegistry, opener: Opener
) -> None:
    """What is not what it should be is refused here, before the registry has it."""
    name = real_registry.reference("lies")
    promised = Descriptor(media_type="a/b", digest=digest(b"right"), size=5)
    sink = opener.sink(name)
    for wrong in (b"wrong", b"long wrong", b"wr"):
        with pytest.raises(IntegrityError):
            await sink.write_blob(promised, body_of(wrong))
    with pytest.raises(NotFoundError):
        await opener.source(name).fetch_blob(promised, max_size=5)


async def test_referrers_by_fallback_tag(real_registry: RunningRegistry, opener: Opener) -> None:
    """Without a referrers API, artifacts are listed under the tag, each once, others kept."""
    name = real_registry.reference("referred")
    sample = sample_image(seed=4)
    sink = opener.sink(name)
    await push(sink, sample)
    await sink.write_blob(EMPTY_DESCRIPTOR, body_of(EMPTY_JSON))
    made = []
    for kind, value in ((ARTIFACT, "1"), ("application/other", "2"), (ARTIFACT, "3")):
        artifact = Manifest.build(
            config=EMPTY_DESCRIPTOR,
            layers=[EMPTY_DESCRIPTOR],
            subject=sample.manifest.descriptor,
            artifact_type=kind,
            annotations={"value": value},
        )
        await sink.write_manifest(artifact, named=False)
        made.append(await sink.write_manifest(artifact, named=False))
    source = opener.source(name)
    found = await source.referrers(sample.manifest.descriptor.digest, ARTIFACT)
    assert found == [made[0], made[2]]
    assert [entry.annotation("value") for entry in found] == ["1", "3"]
    fetched = await source.fetch_manifest(found[0])
    assert isinstance(fetched, Manifest)
    assert fetched.subject is not None
    assert fetched.subject.digest == sample.manifest.descriptor.digest
    assert await source.referrers(digest(b"nobody"), ARTIFACT) == []


async def test_damaged_blob_is_refused(real_registry: RunningRegistry, opener: Opener) -> None:
    """A byte flipped in the registry's storage is found before anything uses the blob."""
    name = real_registry.reference("damaged")
    sample = sample_image(seed=5)
    await push(opener.sink(name), sample)
    path = real_registry.blob_path(digest(sample.layers[0]))
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    layer = sample.manifest.layers[0]
    with pytest.raises(IntegrityError, match=layer.digest):
        await opener.source(name).fetch_blob(layer, max_size=layer.size)


async def test_what_does_not_exist(real_registry: RunningRegistry, opener: Opener) -> None:
    """A missing repository, tag or blob is NotFoundError, and the message names it."""
    await push(opener.sink(real_registry.reference("present")), sample_image(seed=6))
    for name in (real_registry.reference("absent"), real_registry.reference("present", "no")):
        with pytest.raises(NotFoundError, match=name):
            await opener.source(name).resolve(AMD64)


async def test_basic_authentication(tmp_path: Path, opener: Opener) -> None:
    """Pull and push need the password; a login meanwhile is noticed without a restart."""
    sample = sample_image(seed=7)
    with docker_registry(tmp_path / "registry", password=True) as registry:
        name = registry.reference("private")
        sink = opener.sink(name)
        with pytest.raises(UnauthorizedError, match="docker login"):
            await push(sink, sample)
        _log_in(tmp_path, registry.host, "wrong")
        with pytest.raises(UnauthorizedError):
            await push(sink, sample)
        _log_in(tmp_path, registry.host, PASSWORD)
        await push(sink, sample)
        resolved = await opener.source(name).resolve(AMD64)
        assert resolved.manifest.raw == sample.manifest.raw


def _log_in(directory: Path, host: str, password: str) -> None:
    pair = base64.b64encode(f"{USERNAME}:{password}".encode()).decode()
    (directory / "config.json").write_text(json.dumps({"auths": {host: {"auth": pair}}}))


async def test_tls(tmp_path: Path, credentials: CredentialStore) -> None:
    """With the registry's CA everything works over TLS; without it, nothing, and it says why."""
    ca = trustme.CA()
    trusting = ssl.create_default_context()
    ca.configure_trust(trusting)
    sample = sample_image(seed=8)
    with docker_registry(tmp_path / "registry", ca=ca) as registry:
        reference = Reference.parse(registry.reference("secure"))
        async with Transport(tls=trusting) as transport:
            repository = Repository(reference, transport, credentials, plain_http=False)
            await push(RegistrySink(repository), sample)
            resolved = await Registry(repository).resolve(AMD64)
            assert resolved.manifest.raw == sample.manifest.raw
        async with Transport() as transport:
            repository = Repository(reference, transport, credentials, plain_http=False)
            with pytest.raises(TlsError, match=r"certificate of 127\.0\.0\.1:[0-9]+ is not valid"):
                await Registry(repository).resolve(AMD64)


async def test_without_tls_no_certificates_are_read(
    real_registry: RunningRegistry, credentials: CredentialStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system's take 20 ms of every start to read."""

    def refuse() -> ssl.SSLContext:
        pytest.fail("nobody speaks TLS")

    monkeypatch.setattr(ssl, "create_default_context", refuse)
    sample = sample_image(seed=9)
    reference = Reference.parse(real_registry.reference("plain"))
    async with Transport() as transport:
        repository = Repository(reference, transport, credentials, plain_http=True)
        await push(RegistrySink(repository), sample)
        resolved = await Registry(repository).resolve(AMD64)
    assert resolved.manifest.raw == sample.manifest.raw


async def test_tls_towards_plain_http(
    real_registry: RunningRegistry, transport: Transport, credentials: CredentialStore
) -> None:
    """TLS with a registry that has none fails at once and suggests --plain-http."""
    reference = Reference.parse(real_registry.reference("x"))
    repository = Repository(reference, transport, credentials, plain_http=False)
    with pytest.raises(TlsError, match="--plain-http"):
        await Registry(repository, policy=RetryPolicy(attempts=1)).resolve(AMD64)
