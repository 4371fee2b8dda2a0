"""Against a registry that misbehaves: typed errors, no wrong bytes, and life after the fault."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import trio

from index.errors import IntegrityError, UnsupportedError
from snapshotter.registry.errors import (
    ForbiddenError,
    NetworkError,
    NotFoundError,
    ProtocolError,
    RateLimitedError,
    RegistryError,
    ServerError,
    UnauthorizedError,
)
from snapshotter.registry.manifest import EMPTY_DESCRIPTOR, Manifest
from snapshotter.registry.platform import Platform
from snapshotter.registry.retry import RetryPolicy
from tests.registry.conftest import serve
from tests.support.faults import Fault, FaultRegistry
from tests.support.images import digest, push, put, read

if TYPE_CHECKING:
    from tests.registry.conftest import Opener
    from tests.support.images import SampleImage

AMD64 = Platform("linux", "amd64")
ONCE = RetryPolicy(attempts=1)


# Ranges


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (Fault(status=404), NotFoundError),
        (Fault(status=403), ForbiddenError),
        (Fault(status=401), UnauthorizedError),
        (Fault(status=429), RateLimitedError),
        (Fault(status=500), ServerError),
        (Fault(status=503), ServerError),
        (Fault(status=416), ProtocolError),
        (Fault(status=204), ProtocolError),
        (Fault(status=307), ProtocolError),
        (Fault(status=307, headers=(("Location", "ftp://x/"),)), ProtocolError),
        (Fault(cut=0), NetworkError),
        (Fault(cut=1000), NetworkError),
        (Fault(stall=0), NetworkError),
        (Fault(stall=1000), NetworkError),
        (Fault(shorten=1), NetworkError),
        (Fault(headers=(("Content-Range", "bytes 0-9/10"),)), ProtocolError),
        (Fault(headers=(("Content-Range", "nonsense"),)), ProtocolError),
        (Fault(headers=(("Content-Encoding", "gzip"),)), ProtocolError),
    ],
)
async def test_failed_range(
    faulty: FaultRegistry,
    opener: Opener,
    sample: SampleImage,
    fault: Fault,
    error: type[RegistryError],
) -> None:
    """A range fails with the right error after one attempt; the next one gives right bytes."""
    source = serve(faulty, opener, sample)
    layer, data = sample.manifest.layers[0], sample.layers[0]
    faulty.inject(fault, path="/blobs/", times=1)
    with pytest.raises(error):
        await read(source, layer, 5000, 400_000)
    assert len(faulty.asked("/blobs/")) == 1
    assert await read(source, layer, 5000, 400_000) == data[5000:400_000]


async def test_server_without_ranges(
    faulty: FaultRegistry, opener: Opener, sample: SampleImage
) -> None:
    """A 200 with the whole blob still gives exactly the range."""
    source = serve(faulty, opener, sample)
    layer, data = sample.manifest.layers[0], sample.layers[0]
    faulty.inject(Fault(ignore_range=True), path="/blobs/")
    size = layer.size
    for start, end in ((0, 10), (300_000, 300_001), (300_000, size), (size - 1, size), (0, size)):
        assert await read(source, layer, start, end) == data[start:end]


async def test_server_without_ranges_and_another_blob(
    faulty: FaultRegistry, opener: Opener, sample: SampleImage
) -> None:
    """A whole body of another size than the blob's is refused."""
    source = serve(faulty, opener, sample)
    faulty.inject(Fault(ignore_range=True, lengthen=3), path="/blobs/")
    with pytest.raises(ProtocolError, match="bytes there, not"):
        await read(source, sample.manifest.layers[0], 5, 10)


async def test_too_much_data_is_cut(
    faulty: FaultRegistry, opener: Opener, sample: SampleImage
) -> None:
    """Bytes after the range never reach the reader."""
    source = serve(faulty, opener, sample)
    faulty.inject(Fault(lengthen=500_000), path="/blobs/")
    got = await read(source, sample.manifest.layers[0], 100, 70_000)
    assert got == sample.layers[0][100:70_000]


async def test_giving_up_in_mid_body(
    faulty: FaultRegistry, opener: Opener, sample: SampleImage
) -> None:
    """A reader may leave after the first piece, by break or cancellation, and read again."""
    source = serve(faulty, opener, sample)
    layer = sample.manifest.layers[0]
    async with source.open_range(layer, 0, layer.size) as pieces:
        async for _ in pieces:
            break
    with trio.CancelScope() as scope:
        async with source.open_range(layer, 0, layer.size) as pieces:
            async for _ in pieces:
                scope.cancel()
    assert scope.cancelled_caught
    assert await read(source, layer, 0, layer.size) == sample.layers[0]


async def test_dead_host(opener: Opener, sample: SampleImage) -> None:
    """Nobody listens: a NetworkError that names the host, and is worth trying again."""
    listener = (await trio.open_tcp_listeners(0, host="127.0.0.1"))[0]
    port = listener.socket.getsockname()[1]
    await listener.aclose()
    source = opener.source(f"127.0.0.1:{port}/a/b")
    with pytest.raises(NetworkError, match=f"127.0.0.1:{port}.*refused") as caught:
        await source.resolve(AMD64)
    assert caught.value.transient


# Manifests and whole blobs


@pytest.mark.parametrize(
    "fault",
    [Fault(status=500), Fault(status=429), Fault(cut=10), Fault(shorten=5), Fault(stall=7)],
)
async def test_passing_fault_is_survived(
    faulty: FaultRegistry, opener: Opener, sample: SampleImage, fault: Fault
) -> None:
    """A fault that goes away after two answers is not seen by who resolves an image."""
    source = serve(faulty, opener, sample)
    faulty.inject(fault, path="/blobs/", times=2)
    resolved = await source.resolve(AMD64)
    assert resolved.manifest.raw == sample.manifest.raw
    assert len(faulty.asked("/blobs/")) == 3


async def test_lasting_fault_is_reported(
    faulty: FaultRegistry, opener: Opener, sample: SampleImage
) -> None:
    """Attempts are bounded, and the last error is the one reported, with the server's words."""
    source = serve(faulty, opener, sample)
    said = json.dumps({"errors": [{"code": "X", "message": "disk\nfull"}]}).encode()
    faulty.inject(Fault(status=503, body=said))
    with pytest.raises(ServerError, match=r"server error 503 \(disk full\)"):
        await source.resolve(AMD64)
    assert len(faulty.requests) == 3


async def test_retry_after(faulty: FaultRegistry, opener: Opener, sample: SampleImage) -> None:
    """Being told to wait for an hour is an error that says so, not an hour's wait."""
    source = serve(faulty, opener, sample)
    faulty.inject(Fault(status=429, headers=(("Retry-After", "3600"),)))
    with pytest.raises(RateLimitedError, match="wait 3600 seconds") as caught:
        await source.resolve(AMD64)
    assert caught.value.retry_after == 3600
    assert len(faulty.requests) == 1


async def test_damaged_manifest(faulty: FaultRegistry, opener: Opener, sample: SampleImage) -> None:
    """A manifest that is not what its digest says is refused, by tag as by digest."""
    source = serve(faulty, opener, sample)
    faulty.inject(Fault(flip=len(sample.manifest.raw) - 1), path="/manifests/")
    pinned = opener.source(f"{faulty.host}/team/app@{digest(sample.manifest.raw)}")
    with pytest.raises(IntegrityError):
        await pinned.resolve(AMD64)
    with pytest.raises((IntegrityError, ProtocolError)):
        await source.resolve(AMD64)


async def test_lying_digest_header(
    faulty: FaultRegistry, opener: Opener, sample: SampleImage
) -> None:
    """By tag, a Docker-Content-Digest must fit the bytes."""
    source = serve(faulty, opener, sample)
    faulty.inject(Fault(headers=(("Docker-Content-Digest", digest(b"")),)), path="/manifests/")
    with pytest.raises(IntegrityError, match="came with digest"):
        await source.resolve(AMD64)


async def test_manifest_too_large(faulty: FaultRegistry, opener: Opener) -> None:
    """More than 4 MiB of manifest is refused in one line, announced or not."""
    faulty.add_manifest("a", b" " * (4 << 20) + b"{}", "v1")
    with pytest.raises(ProtocolError, match="larger than 4 MiB"):
        await opener.source(f"{faulty.host}/a:v1").resolve(AMD64)


async def test_schema1(faulty: FaultRegistry, opener: Opener) -> None:
    """Docker's first manifest format is named and refused."""
    kind = "application/vnd.docker.distribution.manifest.v1+prettyjws"
    faulty.add_manifest("a", {"schemaVersion": 1}, "v1", media_type=kind)
    with pytest.raises(UnsupportedError, match="schema 1"):
        await opener.source(f"{faulty.host}/a:v1").resolve(AMD64)


async def test_content_type_of_another_kind(
    faulty: FaultRegistry, opener: Opener, sample: SampleImage
) -> None:
    """A manifest served as a platform list is refused; served as a plain file it is read."""
    put(faulty, "a", sample)
    faulty.add_manifest(
        "a", sample.manifest.raw, "v1", media_type="application/vnd.oci.image.index.v1+json"
    )
    with pytest.raises(ProtocolError, match="but says it is"):
        await opener.source(f"{faulty.host}/a:v1").resolve(AMD64)
    faulty.add_manifest("a", sample.manifest.raw, "v1", media_type="binary/octet-stream")
    resolved = await opener.source(f"{faulty.host}/a:v1").resolve(AMD64)
    assert resolved.manifest.raw == sample.manifest.raw


async def test_blob_over_its_limit_is_not_asked_for(
    faulty: FaultRegistry, opener: Opener, sample: SampleImage
) -> None:
    """The manifest's size decides before a byte is fetched."""
    source = serve(faulty, opener, sample)
    with pytest.raises(ProtocolError, match="are allowed"):
        await source.fetch_blob(sample.manifest.layers[0], max_size=1000)
    assert faulty.requests == []


async def test_blob_longer_than_its_descriptor(
    faulty: FaultRegistry, opener: Opener, sample: SampleImage
) -> None:
    """A blob with more bytes than promised is refused, and not read on and on."""
    source = serve(faulty, opener, sample)
    faulty.inject(Fault(lengthen=1), path="/blobs/")
    layer = sample.manifest.layers[0]
    with pytest.raises(ProtocolError, match="more than its"):
        await source.fetch_blob(layer, max_size=layer.size)


# Referrers


async def test_referrers_api(faulty: FaultRegistry, opener: Opener, sample: SampleImage) -> None:
    """With the API, all pages are read, types are told apart, and no tag is written."""
    faulty.referrers_api = True
    faulty.referrers_page = 2
    put(faulty, "team/app", sample, "v1")
    sink = opener.sink(f"{faulty.host}/team/app:v1")
    expected = []
    for number in range(7):
        kind = "application/even" if number % 2 == 0 else "application/odd"
        artifact = Manifest.build(
            config=EMPTY_DESCRIPTOR,
            layers=[EMPTY_DESCRIPTOR],
            subject=sample.manifest.descriptor,
            artifact_type=kind,
            annotations={"number": str(number)},
        )
        written = await sink.write_manifest(artifact, named=False)
        if number % 2 == 0:
            expected.append(written.digest)
    subject = sample.manifest.descriptor.digest
    found = await opener.source(f"{faulty.host}/team/app:v1").referrers(subject, "application/even")
    assert [entry.digest for entry in found] == expected
    assert len(faulty.asked("/referrers/")) == 4
    assert faulty.asked("/manifests/sha256-", "PUT") == []
    assert len(faulty.asked("/manifests/sha256-")) <= 1, "at first nobody knows of the API"
    await opener.source(f"{faulty.host}/team/app:v1").referrers(subject, "application/odd")
    assert len(faulty.asked("/manifests/sha256-")) <= 1


@pytest.mark.parametrize(
    "fault",
    [
        Fault(status=404),
        Fault(status=405),
        Fault(status=200, headers=(("Content-Type", "text/html"),), body=b"<html>"),
    ],
)
async def test_whatever_lacks_the_referrers_api(
    faulty: FaultRegistry, opener: Opener, sample: SampleImage, fault: Fault
) -> None:
    """However a server says that it has no such API, the fallback tag is looked at."""
    faulty.referrers_api = True
    faulty.inject(fault, path="/referrers/")
    found = await serve(faulty, opener, sample).referrers(digest(b"x"), "application/even")
    assert found == []
    assert len(faulty.asked("/manifests/sha256-")) == 1


# Pushing


async def test_push_through_faults(
    faulty: FaultRegistry, opener: Opener, sample: SampleImage
) -> None:
    """Each step of a push that fails once is done again, whole."""
    faulty.inject(Fault(status=500), method="POST", times=1)
    faulty.inject(Fault(status=502), method="PUT", times=1)
    faulty.inject(Fault(status=429), method="HEAD", times=1)
    await push(opener.sink(f"{faulty.host}/new:v1"), sample)
    assert sample.blobs.items() <= faulty.blobs.items()
    assert faulty.manifests["new", "v1"][1] == sample.manifest.raw


async def test_push_skips_what_is_there(
    faulty: FaultRegistry, opener: Opener, sample: SampleImage
) -> None:
    """A blob that the registry has is not sent."""
    put(faulty, "new", sample)
    await push(opener.sink(f"{faulty.host}/new:v1"), sample)
    assert faulty.asked("/uploads/") == []


async def test_token_that_expires_before_the_upload(
    faulty: FaultRegistry, opener: Opener, sample: SampleImage
) -> None:
    """A 401 to a streamed body, which cannot be sent twice, starts the upload again."""
    faulty.token_realm = f"http://{faulty.host}/token"
    challenge = f'Bearer realm="{faulty.token_realm}",service="test"'
    fault = Fault(status=401, headers=(("WWW-Authenticate", challenge),))
    faulty.inject(fault, path="/uploads/", method="PUT", times=1)
    await push(opener.sink(f"{faulty.host}/new:v1"), sample)
    assert sample.blobs.items() <= faulty.blobs.items()
