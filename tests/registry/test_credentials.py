"""Credentials from docker's configuration and from real helper programs."""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import trio

from snapshotter.registry.auth import IdentityToken, Password
from snapshotter.registry.credentials import CredentialStore, usual_files
from snapshotter.registry.errors import CredentialsError
from snapshotter.registry.handed import LIFETIME, MOST, HandedCredentials
from snapshotter.registry.reference import Reference

if TYPE_CHECKING:
    from trio.testing import MockClock


def encoded(pair: str) -> str:
    return base64.b64encode(pair.encode()).decode()


def store(directory: Path, document: object) -> CredentialStore:
    path = directory / "config.json"
    path.write_text(json.dumps(document))
    return CredentialStore(path)


def helper(directory: Path, name: str, script: str) -> None:
    path = directory / f"docker-credential-{name}"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


async def test_entries(tmp_path: Path) -> None:
    """Every form of entry is read, under a host or a URL of it."""
    found = store(
        tmp_path,
        {
            "auths": {
                "a.io": {"auth": encoded("me:pass:word")},
                "https://b.io:5000/v1/": {"username": "me", "password": "p"},
                "c.io": {"identitytoken": "id", "auth": encoded("<token>:")},
                "https://index.docker.io/v1/": {"auth": encoded("hub:p")},
                "empty.io": {},
            },
            "HttpHeaders": {"x": "y"},
        },
    )
    assert await found.lookup("a.io") == Password("me", "pass:word")
    assert await found.lookup("b.io:5000") == Password("me", "p")
    assert await found.lookup("c.io") == IdentityToken("id")
    assert await found.lookup("docker.io") == Password("hub", "p")
    assert await found.lookup("empty.io") is None
    assert await found.lookup("b.io") is None


async def test_no_file(tmp_path: Path) -> None:
    """Nobody ever logged in: no credentials, no error."""
    assert await CredentialStore(tmp_path / "config.json").lookup("a.io") is None


async def test_docker_config_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """$DOCKER_CONFIG names the directory of the file."""
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    store(tmp_path, {"auths": {"a.io": {"auth": encoded("me:p")}}})
    assert await CredentialStore().lookup("a.io") == Password("me", "p")


async def test_all_the_files_that_tools_keep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one that is named first, then docker's, then podman's."""
    places = {
        "REGISTRY_AUTH_FILE": "named.json",
        "DOCKER_CONFIG": "docker/config.json",
        "XDG_RUNTIME_DIR": "run/containers/auth.json",
        "XDG_CONFIG_HOME": "settings/containers/auth.json",
    }
    for variable, place in places.items():
        named = tmp_path / place
        named.parent.mkdir(parents=True, exist_ok=True)
        value = named if variable == "REGISTRY_AUTH_FILE" else tmp_path / place.split("/")[0]
        monkeypatch.setenv(variable, str(value))
    for variable, place in reversed(places.items()):
        entry = {"auths": {"a.io": {"username": variable, "password": "p"}}}
        (tmp_path / place).write_text(json.dumps(entry))
        assert await CredentialStore().lookup("a.io") == Password(variable, "p")


async def test_podman_of_root_keeps_them_where_a_reboot_forgets(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    assert Path(f"/run/containers/{os.getuid()}/auth.json") in usual_files()


async def test_a_repository_may_have_its_own(tmp_path: Path) -> None:
    """The longest path that fits; what is for another path of the registry is not taken."""
    found = store(
        tmp_path,
        {
            "auths": {
                "a.io/team/app": {"auth": encoded("app:p")},
                "a.io/team": {"auth": encoded("team:p")},
                "a.io": {"auth": encoded("all:p")},
                "b.io/team": {"auth": encoded("team:p")},
            }
        },
    )
    assert await found.lookup("a.io", "team/app") == Password("app", "p")
    assert await found.lookup("a.io", "team/app/part") == Password("app", "p")
    assert await found.lookup("a.io", "team/other") == Password("team", "p")
    assert await found.lookup("a.io", "teams/app") == Password("all", "p")
    assert await found.lookup("a.io") == Password("all", "p")
    assert await found.lookup("b.io", "other") is None


async def test_changed_file(tmp_path: Path) -> None:
    """A login or logout is noticed at the next look-up."""
    found = store(tmp_path, {})
    assert await found.lookup("a.io") is None
    store(tmp_path, {"auths": {"a.io": {"auth": encoded("me:p")}}})
    assert await found.lookup("a.io") == Password("me", "p")
    (tmp_path / "config.json").unlink()
    assert await found.lookup("a.io") is None


@pytest.mark.parametrize("content", ["", "[]", '{"auths": 1}', "\ud800"])
async def test_malformed_file(tmp_path: Path, content: str) -> None:
    """A broken file is named in the error."""
    path = tmp_path / "config.json"
    path.write_bytes(content.encode(errors="surrogatepass"))
    with pytest.raises(CredentialsError, match=str(path)):
        await CredentialStore(path).lookup("a.io")


async def test_auth_that_is_not_base64(tmp_path: Path) -> None:
    """A broken entry is an error for its own registry only."""
    found = store(tmp_path, {"auths": {"a.io": {"auth": "?"}, "b.io": {"auth": encoded("x:y")}}})
    assert await found.lookup("b.io") == Password("x", "y")
    with pytest.raises(CredentialsError, match=r"a\.io"):
        await found.lookup("a.io")


async def test_helpers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A registry's own helper comes before the general store, and both before the file."""
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    answer = '{"ServerURL":"%s","Username":"%s","Secret":"%s"}'
    helper(tmp_path, "one", f'read s; printf \'{answer}\' "$s" "$s" one-$1')
    helper(tmp_path, "all", f"read s; printf '{answer}' \"$s\" '<token>' \"$s\"")
    found = store(
        tmp_path,
        {
            "credsStore": "all",
            "credHelpers": {"a.io": "one"},
            "auths": {"a.io": {"auth": encoded("file:p")}},
        },
    )
    assert await found.lookup("a.io") == Password("a.io", "one-get")
    assert await found.lookup("b.io") == IdentityToken("b.io")
    assert await found.lookup("docker.io") == IdentityToken("https://index.docker.io/v1/")


async def test_helper_that_knows_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A helper without an entry leaves the file's."""
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    helper(tmp_path, "none", "echo credentials not found in native keychain; exit 1")
    auths = {"a.io": {"auth": encoded("file:p")}}
    found = store(tmp_path, {"credsStore": "none", "auths": auths})
    assert await found.lookup("a.io") == Password("file", "p")
    assert await found.lookup("b.io") is None


@pytest.mark.parametrize("script", ["echo boom >&2; exit 3", "echo nonsense", None])
async def test_helper_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str | None
) -> None:
    """A helper that fails, talks nonsense, or is missing is named in the error."""
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    if script is not None:
        helper(tmp_path, "bad", script)
    with pytest.raises(CredentialsError, match="docker-credential-bad"):
        await store(tmp_path, {"credsStore": "bad"}).lookup("a.io")


async def test_helper_name_is_not_a_path(tmp_path: Path) -> None:
    """The configuration cannot name a program outside PATH."""
    with pytest.raises(CredentialsError, match="malformed name"):
        await store(tmp_path, {"credsStore": "../../x"}).lookup("a.io")


# --- what was handed over ---


def reference(text: str) -> Reference:
    return Reference.parse(text)


async def test_handed_credentials_are_for_one_image(tmp_path: Path) -> None:
    """What a file has is for all others, and for that one when nothing is handed over any more."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"auths": {"a.io": {"auth": encoded("file:p")}}}))
    handed = HandedCredentials()
    found = CredentialStore(path, handed=handed)
    handed.put(reference("a.io/team/app:1"), Password("me", "p"))
    assert await found.lookup("a.io", "team/app", "1") == Password("me", "p")
    assert await found.lookup("a.io", "team/app", "2") == Password("file", "p")
    assert await found.lookup("a.io", "team/app/more", "1") == Password("file", "p")
    assert await found.lookup("b.io", "team/app", "1") is None
    handed.put(reference("a.io/team/app:1"), None)
    assert await found.lookup("a.io", "team/app", "1") == Password("file", "p")


async def test_handed_credentials_are_forgotten(autojump_clock: MockClock) -> None:
    handed = HandedCredentials()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(handed.forget_in_time)
        handed.put(reference("a.io/app:1"), Password("me", "p"))
        await trio.sleep(LIFETIME - 1)
        assert handed.get("a.io", "app", "1") == Password("me", "p")
        await trio.sleep(1)
        assert handed.get("a.io", "app", "1") is None
        await trio.sleep(60)
        assert handed._kept == {}
        nursery.cancel_scope.cancel()


async def test_only_so_many_are_kept() -> None:
    handed = HandedCredentials()
    for number in range(MOST + 1):
        handed.put(reference(f"a.io/app:{number}"), IdentityToken("t"))
    assert len(handed._kept) == MOST
    assert handed.get("a.io", "app", "0") is None
    assert handed.get("a.io", "app", str(MOST)) == IdentityToken("t")
