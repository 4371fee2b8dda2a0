"""Logging in at a registry that misbehaves, and going where it leads."""

from __future__ import annotations

import base64
import json
from typing import TYPE_CHECKING

import pytest
import trio

from snapshotter.registry import handed as handed_module
from snapshotter.registry.auth import Password
from snapshotter.registry.credentials import CredentialStore
from snapshotter.registry.errors import (
    ForbiddenError,
    NetworkError,
    ProtocolError,
    UnauthorizedError,
)
from snapshotter.registry.handed import HandedCredentials
from snapshotter.registry.platform import Platform
from snapshotter.registry.reference import Reference
from snapshotter.registry.retry import RetryPolicy
from tests.registry.conftest import Opener, serve
from tests.support.faults import Fault, FaultRegistry
from tests.support.images import digest, push, read

if TYPE_CHECKING:
    from pathlib import Path

    from snapshotter.registry.transport import Transport
    from tests.support.images import SampleImage

AMD64 = Platform("linux", "amd64")
ONCE = RetryPolicy(attempts=1)


# Authentication


def log_in(directory: Path, host: str, **entry: str) -> None:
    (directory / "config.json").write_text(json.dumps({"auths": {host: entry}}))


def encoded(username: str, password: str) -> str:
    return base64.b64encode(f"{username}:{password}".encode()).decode()


async def test_anonymous_token(faulty: FaultRegistry, opener: Opener, sample: SampleImage) -> None:
    """A public registry with tokens: one token for all requests to a repository."""
    faulty.token_realm = f"http://{faulty.host}/token"
    source = serve(faulty, opener, sample)
    await source.resolve(AMD64)
    await read(source, sample.manifest.layers[0], 0, 100)
    tokens = faulty.asked("/token")
    assert len(tokens) == 1
    assert tokens[0].query["scope"] == ["repository:team/app:pull"]
    assert tokens[0].query["service"] == ["test"]


async def test_token_by_password(
    faulty: FaultRegistry, opener: Opener, sample: SampleImage, tmp_path: Path
) -> None:
    """The password goes to the token server alone; pushing asks for a token that may push."""
    faulty.token_realm = f"http://{faulty.host}/token"
    faulty.users["bob"] = "secret"
    with pytest.raises(UnauthorizedError, match="docker login"):
        await serve(faulty, opener, sample).resolve(AMD64)
    log_in(tmp_path, faulty.host, auth=encoded("bob", "secret"))
    await push(opener.sink(f"{faulty.host}/team/app:v2"), sample)
    await opener.source(f"{faulty.host}/team/app:v2").resolve(AMD64)
    basic = [r for r in faulty.requests if "Basic" in r.headers.get("authorization", "")]
    assert basic
    assert {request.path for request in basic} == {"/token"}


async def test_wrong_password(
    faulty: FaultRegistry, opener: Opener, sample: SampleImage, tmp_path: Path
) -> None:
    """A refused password is tried once and named as the reason."""
    faulty.token_realm = f"http://{faulty.host}/token"
    faulty.users["bob"] = "secret"
    log_in(tmp_path, faulty.host, auth=encoded("bob", "guess"))
    with pytest.raises(UnauthorizedError, match="refuses the credentials"):
        await serve(faulty, opener, sample).resolve(AMD64)
    assert len(faulty.asked("/token")) == 1


async def test_identity_token(
    faulty: FaultRegistry, opener: Opener, sample: SampleImage, tmp_path: Path
) -> None:
    """An identity token is exchanged for access tokens with OAuth 2, in a POST."""
    faulty.token_realm = f"http://{faulty.host}/token"
    faulty.users["nobody"] = "can log in with a password"
    faulty.identity_tokens.add("identity")
    log_in(tmp_path, faulty.host, identitytoken="identity")
    await serve(faulty, opener, sample).resolve(AMD64)
    assert [request.method for request in faulty.asked("/token")] == ["POST"]


async def test_expired_token_is_renewed_in_place(
    faulty: FaultRegistry, opener: Opener, sample: SampleImage
) -> None:
    """A 401 in the middle of work costs one token request, not an error."""
    faulty.token_realm = f"http://{faulty.host}/token"
    source = serve(faulty, opener, sample)
    layer = sample.manifest.layers[0]
    await read(source, layer, 0, 100)
    faulty.revoke_tokens()
    assert await read(source, layer, 100, 200) == sample.layers[0][100:200]
    assert len(faulty.asked("/token")) == 2


async def test_many_readers_share_one_renewal(
    faulty: FaultRegistry, opener: Opener, sample: SampleImage
) -> None:
    """When a token expires under twenty requests, one new token is asked for."""
    faulty.token_realm = f"http://{faulty.host}/token"
    source = serve(faulty, opener, sample)
    await read(source, sample.manifest.layers[0], 0, 1)
    faulty.revoke_tokens()
    async with trio.open_nursery() as nursery:
        for number in range(20):
            nursery.start_soon(read, source, sample.manifest.layers[0], number, number + 1)
    assert len(faulty.asked("/token")) == 2


async def test_forbidden_token_is_renewed_once(
    faulty: FaultRegistry, opener: Opener, sample: SampleImage
) -> None:
    """Some registries say 403 for an expired token: a new one is tried, once."""
    faulty.token_realm = f"http://{faulty.host}/token"
    source = serve(faulty, opener, sample)
    layer = sample.manifest.layers[0]
    await read(source, layer, 0, 1)
    faulty.inject(Fault(status=403), path="/blobs/", times=1)
    assert await read(source, layer, 0, 100) == sample.layers[0][:100]
    faulty.inject(Fault(status=403), path="/blobs/")
    with pytest.raises(ForbiddenError):
        await read(source, layer, 0, 100)
    assert len(faulty.asked("/token")) == 3


# Redirects


async def test_redirect_to_another_host(
    faulty: FaultRegistry,
    blob_host: FaultRegistry,
    opener: Opener,
    sample: SampleImage,
    tmp_path: Path,
) -> None:
    """Blobs come from where the registry sends us; our credentials stay behind; the signed
    URL is used again, and asked for anew when it is refused."""
    faulty.users["bob"] = "secret"
    log_in(tmp_path, faulty.host, auth=encoded("bob", "secret"))
    faulty.redirect_blobs_to = blob_host.host
    blob_host.signatures = faulty.signed
    blob_host.blobs.update(sample.blobs)
    source = serve(faulty, opener, sample)
    layer, data = sample.manifest.layers[0], sample.layers[0]
    for start in (0, 1000, 2000):
        assert await read(source, layer, start, start + 1000) == data[start : start + 1000]
    assert len(faulty.signed) == 1
    faulty.signed.clear()
    assert await read(source, layer, 7, 9) == data[7:9]
    assert len(faulty.signed) == 1
    assert len(blob_host.requests) == 5
    assert all("authorization" not in request.headers for request in blob_host.requests)


async def test_redirect_host_fails(
    faulty: FaultRegistry, blob_host: FaultRegistry, opener: Opener, sample: SampleImage
) -> None:
    """A redirect whose host broke is not kept: the next attempt asks the registry again."""
    faulty.redirect_blobs_to = blob_host.host
    blob_host.signatures = faulty.signed
    blob_host.blobs.update(sample.blobs)
    source = serve(faulty, opener, sample)
    layer = sample.manifest.layers[0]
    await read(source, layer, 0, 10)
    blob_host.inject(Fault(cut=3), times=1)
    with pytest.raises(NetworkError):
        await read(source, layer, 0, 10)
    assert await read(source, layer, 0, 10) == sample.layers[0][:10]
    assert len(faulty.signed) == 2


async def test_redirects_in_a_circle(
    faulty: FaultRegistry, opener: Opener, sample: SampleImage
) -> None:
    """Redirects without end are an error after a few."""
    source = serve(faulty, opener, sample)
    target = f"http://{faulty.host}/v2/team/app/blobs/{digest(b'round')}"
    faulty.inject(Fault(status=302, headers=(("Location", target),)), path="/blobs/")
    with pytest.raises(ProtocolError, match="redirects"):
        await read(source, sample.manifest.layers[0], 0, 10)
    assert len(faulty.requests) < 10


# What was handed over


def handed_over(tmp_path: Path, transport: Transport, host: str, *passwords: str) -> list[Opener]:
    """Openers that know a password each, beside the file, for the image of these tests."""
    made = []
    for password in passwords:
        handed = HandedCredentials()
        handed.put(Reference.parse(f"{host}/team/app:v1"), Password("bob", password))
        store = CredentialStore(tmp_path / "config.json", handed=handed)
        made.append(Opener(transport, store))
    return made


@pytest.mark.parametrize("tokens", [False, True])
async def test_handed_credentials_that_are_refused_give_way(
    faulty: FaultRegistry,
    transport: Transport,
    sample: SampleImage,
    tmp_path: Path,
    *,
    tokens: bool,
) -> None:
    """Those that podman read from a file an hour ago may have been renewed there meanwhile."""
    faulty.users["bob"] = "secret"
    if tokens:
        faulty.token_realm = f"http://{faulty.host}/token"
    right, wrong = handed_over(tmp_path, transport, faulty.host, "secret", "old")
    await serve(faulty, right, sample).resolve(AMD64)
    with pytest.raises(UnauthorizedError):
        await serve(faulty, wrong, sample).resolve(AMD64)
    (wrong,) = handed_over(tmp_path, transport, faulty.host, "old")
    log_in(tmp_path, faulty.host, auth=encoded("bob", "secret"))
    await serve(faulty, wrong, sample).resolve(AMD64)


async def test_a_password_is_not_used_any_more_when_its_time_is_over(
    faulty: FaultRegistry,
    transport: Transport,
    sample: SampleImage,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    faulty.users["bob"] = "secret"
    monkeypatch.setattr(handed_module, "LIFETIME", 0.5)
    (opener,) = handed_over(tmp_path, transport, faulty.host, "secret")
    source = serve(faulty, opener, sample)
    await source.resolve(AMD64)
    await trio.sleep(0.5)
    with pytest.raises(UnauthorizedError):
        await read(source, sample.manifest.layers[0], 0, 100)
