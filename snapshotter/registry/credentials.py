"""Credentials from docker's `config.json` and podman's `auth.json`, and from the credential helpers
that they name.

Sources: docker/cli `configfile` and `credentials`; containers-auth.json(5);
docker-credential-helpers' protocol: the registry's name on standard input, JSON on standard output.
"""

from __future__ import annotations

import base64
import binascii
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import trio

from snapshotter.registry.auth import Credential, IdentityToken, Password
from snapshotter.registry.errors import CredentialsError
from snapshotter.registry.reference import DEFAULT_REGISTRY

if TYPE_CHECKING:
    import subprocess

    from snapshotter.registry.handed import HandedCredentials

_DEFAULT_REGISTRY_KEY = "https://index.docker.io/v1/"
_TOKEN_USERNAME = "<token>"  # noqa: S105  (helpers say so that the secret is an identity token)
_HELPER_DEADLINE = 30.0  # seconds; a guess: cloud helpers make a few requests of their own
_HELPER_NAME = re.compile(r"[A-Za-z0-9._-]+")
_NOT_FOUND = "credentials not found"  # how every helper's answer starts that has none


class _Auth(msgspec.Struct):
    auth: str | None = None
    username: str | None = None
    password: str | None = None
    identitytoken: str | None = None


class _Config(msgspec.Struct, rename={"creds_store": "credsStore", "cred_helpers": "credHelpers"}):
    auths: dict[str, _Auth] | None = None
    creds_store: str | None = None
    cred_helpers: dict[str, str] | None = None


class _HelperAnswer(msgspec.Struct, rename={"username": "Username", "secret": "Secret"}):
    username: str = ""
    secret: str = ""


class CredentialStore:
    """Looks credentials up whenever they are needed: a `docker login` meanwhile counts."""

    def __init__(self, *files: Path, handed: HandedCredentials | None = None) -> None:
        """`files` are asked in order; without any, those where tools keep them (`usual_files`).
        What was `handed` over goes before them."""
        self._files = [_CredentialFile(path) for path in files or usual_files()]
        self._handed = handed

    async def lookup(
        self, registry: str, repository: str = "", selector: str = ""
    ) -> Credential | None:
        """The credential for a reference's registry, or None; the first file that has one counts.

        `selector` is the image's tag or digest. In a file what is filed under the repository, or a
        path above it, goes before what is filed under the registry (containers-auth.json(5)).
        Raises CredentialsError if a file is malformed or a helper fails.
        """
        if self._handed is not None:
            handed = self._handed.get(registry, repository, selector)
            if handed is not None:
                return handed
        for file in self._files:
            credential = await file.lookup(registry, repository)
            if credential is not None:
                return credential
        return None

    def refused(self, credential: Credential) -> bool:
        """A registry does not take a credential; tells if another may be found now."""
        return self._handed is not None and self._handed.drop(credential)


class _CredentialFile:
    """One file, read again when it has changed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._version: tuple[int, int, int] | None = None
        self._config = _Config()

    async def lookup(self, registry: str, repository: str) -> Credential | None:
        config = await trio.to_thread.run_sync(self._load)
        auths, helpers = config.auths or {}, config.cred_helpers or {}
        keys = _keys(registry)
        for name in _paths(registry, repository):
            if name in helpers and (credential := await _ask_helper(helpers[name], name)):
                return credential
            if name in auths and (credential := self._credential(name, auths[name])):
                return credential
        helper = next((helpers[key] for key in keys if key in helpers), config.creds_store)
        if helper and (credential := await _ask_helper(helper, keys[0])):
            return credential
        for name, entry in auths.items():
            ours = _is_registry(name) and _host(name) in keys
            if ours and (credential := self._credential(name, entry)):
                return credential
        return None

    def _load(self) -> _Config:
        """The file's content, read again only if it changed."""
        try:
            status = self._path.stat()
            version = (status.st_ino, status.st_size, status.st_mtime_ns)
            if version != self._version:
                self._config = msgspec.json.decode(self._path.read_bytes(), type=_Config)
                self._version = version
        except FileNotFoundError:
            self._version, self._config = None, _Config()
        except OSError as error:
            raise CredentialsError(f"cannot read {self._path} ({error.strerror})") from error
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise CredentialsError(
                f"{self._path} is malformed ({error})", hint="repair it, or docker login anew"
            ) from error
        return self._config

    def _credential(self, name: str, entry: _Auth) -> Credential | None:
        if entry.identitytoken:
            return IdentityToken(entry.identitytoken)
        if entry.auth:
            try:
                pair = base64.b64decode(entry.auth, validate=True).decode()
            except (binascii.Error, UnicodeDecodeError) as error:
                raise CredentialsError(
                    f"the auth of {name} in {self._path} is not base64",
                    hint=f"docker login {name}",
                ) from error
            username, colon, password = pair.rstrip("\0").partition(":")
            return Password(username, password) if colon else None
        if entry.username and entry.password:
            return Password(entry.username, entry.password)
        return None


def usual_files() -> tuple[Path, ...]:
    """Where tools keep credentials: the file in $REGISTRY_AUTH_FILE, docker's ($DOCKER_CONFIG), and
    podman's two, of which the first is gone after a reboot. None need exist.
    """
    named = os.environ.get("REGISTRY_AUTH_FILE")
    docker = os.environ.get("DOCKER_CONFIG") or Path.home() / ".docker"
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    settings = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return (
        *((Path(named),) if named else ()),
        Path(docker) / "config.json",
        Path(runtime, "containers/auth.json")
        if runtime
        else Path(f"/run/containers/{os.getuid()}/auth.json"),
        Path(settings) / "containers/auth.json",
    )


def _paths(registry: str, repository: str) -> list[str]:
    """The repository and the paths above it, without the registry itself, longest first."""
    parts = repository.split("/") if repository else []
    return ["/".join((registry, *parts[:length])) for length in range(len(parts), 0, -1)]


def _is_registry(name: str) -> bool:
    """Whether an entry is for a whole registry, and not for `registry/path`: docker writes some as
    URLs, `https://host:5000/v1/`, and older ones as `host/v1/`."""
    path = re.sub(r"^https?://", "", name).partition("/")[2].strip("/")
    return "://" in name or path in ("", "v1", "v2")


def _keys(registry: str) -> list[str]:
    """The names a registry may have in the file; the first is what helpers are asked for."""
    if registry == DEFAULT_REGISTRY:
        return [_DEFAULT_REGISTRY_KEY, "index.docker.io", DEFAULT_REGISTRY]
    return [registry]


def _host(name: str) -> str:
    """Entries may be written as URLs: `https://host:5000/v1/`."""
    return re.sub(r"^https?://", "", name).partition("/")[0].lower()


async def _ask_helper(helper: str, server: str) -> Credential | None:
    program = f"docker-credential-{helper}"
    if not _HELPER_NAME.fullmatch(helper):
        raise CredentialsError(f"malformed name of a credential helper, {helper!r}")
    with trio.move_on_after(_HELPER_DEADLINE) as patience:
        try:
            done = await trio.run_process(
                [program, "get"],
                stdin=server.encode(),
                capture_stdout=True,
                capture_stderr=True,
                check=False,
            )
        except OSError as error:
            raise CredentialsError(
                f"cannot run {program} ({error.strerror})",
                hint="install it, or take it out of docker's config.json",
            ) from error
    if patience.cancelled_caught:
        raise CredentialsError(f"{program} does not answer within {_HELPER_DEADLINE:g} s")
    return _helper_answer(program, server, done)


def _helper_answer(
    program: str, server: str, done: subprocess.CompletedProcess[bytes]
) -> Credential | None:
    if done.returncode != 0:
        said = (done.stdout.strip() or done.stderr.strip()).decode(errors="replace")
        if said.startswith(_NOT_FOUND):
            return None
        raise CredentialsError(f"{program} fails for {server} ({said[:200] or 'no reason given'})")
    try:
        answer = msgspec.json.decode(done.stdout, type=_HelperAnswer)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise CredentialsError(f"{program} answers with something else than JSON") from error
    if not answer.secret:
        return None
    if answer.username == _TOKEN_USERNAME:
        return IdentityToken(answer.secret)
    return Password(answer.username, answer.secret)
