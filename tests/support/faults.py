"""A registry that misbehaves as told, and counts what it is asked for.

It serves what is put into it and takes pushes; each `Fault` that is injected changes the answers
to some requests. Served with trio and h11, in the test's own process:

    async with fault_registry() as registry:
        layer = registry.add_blob(data)
        registry.inject(Fault(cut=1000), path="/blobs/", times=1)
        ...
        assert registry.sent(layer) == 1000
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import math
import re
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, urlsplit

import h11
import trio

if TYPE_CHECKING:
    import ssl
    from collections.abc import AsyncIterator

OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_PLATFORM_LIST = "application/vnd.oci.image.index.v1+json"

_BLOCK = 64 << 10  # bytes per write; what was sent before a fault is known to this


@dataclass(frozen=True)
class Fault:
    """What goes wrong with an answer. Everything that is not set stays as it should be.

    `status`, with `headers` and `body`, replaces the answer. `headers` alone are added to it.
    `ignore_range` answers 200 with all of a blob. `cut` closes the connection after that many
    bytes of body; `shorten` announces and sends that many bytes fewer; `lengthen` adds that many
    at the end; `flip` inverts the byte at that place of the body; `stall` sends that many bytes
    of body, and then nothing until the client goes away; `gate` holds the answer until it is set.
    """

    status: int | None = None
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes = b""
    ignore_range: bool = False
    cut: int | None = None
    shorten: int = 0
    lengthen: int = 0
    flip: int | None = None
    stall: int | None = None
    gate: trio.Event | None = None


@dataclass
class Recorded:
    """One request, its answer's status, and how many bytes of body went out."""

    method: str
    path: str
    query: dict[str, list[str]]
    headers: dict[str, str]
    status: int = 0
    sent: int = 0


@dataclass
class _Rule:
    fault: Fault
    path: re.Pattern[str]
    method: str
    left: float


@dataclass
class _Answer:
    status: int
    headers: list[tuple[str, str]] = field(default_factory=list)
    body: bytes = b""


@dataclass
class FaultRegistry:
    """The registry's content and behaviour; change it at any time."""

    host: str
    root: str = "/v2"
    """Where the API begins."""
    blobs: dict[str, bytes] = field(default_factory=dict)
    manifests: dict[tuple[str, str], tuple[str, bytes]] = field(default_factory=dict)
    requests: list[Recorded] = field(default_factory=list)
    referrers_api: bool = False
    referrers_page: int = 100
    users: dict[str, str] = field(default_factory=dict)
    """Passwords by user name. Not empty: every request needs one of them, or a token for it."""
    token_realm: str | None = None
    """Set: requests need a Bearer token from this URL; `/token` of this server issues them."""
    identity_tokens: set[str] = field(default_factory=set)
    token_lifetime: int = 300
    redirect_blobs_to: str | None = None
    """Set: blobs are redirected to that host with a signed URL, which only that host checks."""
    signatures: list[str] | None = None
    """Not None: blobs need one of these signatures, and no Authorization is tolerated."""
    signed: list[str] = field(default_factory=list)
    """The signatures of the redirects so far; hand the list to the other host's `signatures`."""
    connections: int = 0
    most_connections: int = 0
    _tokens: dict[str, str] = field(default_factory=dict)
    _rules: list[_Rule] = field(default_factory=list)
    _uploads: dict[str, bytearray] = field(default_factory=dict)
    _numbers: itertools.count[int] = field(default_factory=itertools.count)

    def add_blob(self, data: bytes) -> str:
        """Put a blob in; its digest."""
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        self.blobs[digest] = data
        return digest

    def add_manifest(
        self, repository: str, document: object, *tags: str, media_type: str = OCI_MANIFEST
    ) -> str:
        """Put a manifest in, as bytes or to be written as JSON; its digest."""
        raw = document if isinstance(document, bytes) else json.dumps(document).encode()
        digest = f"sha256:{hashlib.sha256(raw).hexdigest()}"
        for name in (digest, *tags):
            self.manifests[repository, name] = (media_type, raw)
        return digest

    def inject(
        self, fault: Fault, *, path: str = "", method: str = "", times: float = math.inf
    ) -> None:
        """Apply `fault` to the next `times` requests whose path matches the pattern `path`."""
        self._rules.append(_Rule(fault, re.compile(path), method, times))

    def heal(self) -> None:
        """Take all faults back."""
        self._rules.clear()

    def revoke_tokens(self) -> None:
        """Let every token that was given out be expired."""
        self._tokens.clear()

    def asked(self, path: str = "", method: str = "") -> list[Recorded]:
        """The requests so far whose path matches the pattern."""
        return [
            request
            for request in self.requests
            if re.search(path, request.path) and method in ("", request.method)
        ]

    def sent(self, path: str) -> int:
        """Bytes of body sent for requests whose path matches, such as a blob's digest."""
        return sum(request.sent for request in self.asked(path))

    def fault_for(self, request: Recorded) -> Fault:
        """The fault of the first rule that fits, which it uses up."""
        for rule in self._rules:
            fits = rule.path.search(request.path) and rule.method in ("", request.method)
            if rule.left > 0 and fits:
                rule.left -= 1
                return rule.fault
        return Fault()

    def answer(self, request: Recorded, body: bytes) -> _Answer:
        """What a good registry answers."""
        if request.path == "/token":
            return self._issue(request, body)
        if (refusal := self._refusal(request)) is not None:
            return refusal
        match = re.fullmatch(rf"{self.root}/(.+)/(blobs|manifests|referrers)/(.+)", request.path)
        if match is None:
            return _Answer(404)
        repository, kind, name = match.groups()
        if kind == "referrers":
            return self._referrers(request, repository, name)
        if kind == "manifests":
            return self._manifest(request, repository, name, body)
        if name.startswith("uploads/"):
            return self._upload(request, name.removeprefix("uploads/"), body)
        return self._blob(request, name)

    def _refusal(self, request: Recorded) -> _Answer | None:
        authorization = request.headers.get("authorization", "")
        if self.token_realm is not None:
            scheme, _, token = authorization.partition(" ")
            push = request.method not in ("GET", "HEAD")
            granted = self._tokens.get(token, "") if scheme == "Bearer" else ""
            if granted and (not push or "push" in granted):
                return None
            path = request.path.removeprefix(f"{self.root}/")
            repository = re.sub(r"/(blobs|manifests|referrers)/.*", "", path)
            scope = f"repository:{repository}:{'pull,push' if push else 'pull'}"
            challenge = f'Bearer realm="{self.token_realm}",service="test",scope="{scope}"'
            return _Answer(401, [("WWW-Authenticate", challenge)])
        if self.users and not self._knows(authorization):
            return _Answer(401, [("WWW-Authenticate", 'Basic realm="test"')])
        return None

    def _knows(self, authorization: str) -> bool:
        scheme, _, encoded = authorization.partition(" ")
        if scheme != "Basic":
            return False
        username, _, password = base64.b64decode(encoded).decode().partition(":")
        return self.users.get(username) == password

    def _issue(self, request: Recorded, body: bytes) -> _Answer:
        if request.method == "POST":
            form = parse_qs(body.decode())
            known = form.get("refresh_token", [""])[0] in self.identity_tokens
            scopes = form.get("scope", [""])[0]
        else:
            known = not self.users or self._knows(request.headers.get("authorization", ""))
            scopes = " ".join(request.query.get("scope", []))
        if not known:
            return _Answer(401)
        token = f"token-{next(self._numbers)}"
        self._tokens[token] = scopes
        answer = {"token": token, "expires_in": self.token_lifetime}
        return _Answer(200, [("Content-Type", "application/json")], json.dumps(answer).encode())

    def _blob(self, request: Recorded, digest: str) -> _Answer:
        if digest not in self.blobs:
            return _Answer(404)
        if self.redirect_blobs_to is not None:
            signature = f"signature-{next(self._numbers)}"
            self.signed.append(signature)
            target = f"http://{self.redirect_blobs_to}{request.path}?signature={signature}"
            return _Answer(307, [("Location", target)])
        if self.signatures is not None:
            if "authorization" in request.headers:
                return _Answer(400)
            signature = request.query.get("signature", [""])[0]
            if signature not in self.signatures:
                return _Answer(403)
        data = self.blobs[digest]
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", request.headers.get("range", ""))
        if match is None:
            return _Answer(200, [], data)
        start, end = int(match[1]), int(match[2]) + 1
        if start >= len(data):
            return _Answer(416, [("Content-Range", f"bytes */{len(data)}")])
        body = data[start:end]
        content_range = f"bytes {start}-{start + len(body) - 1}/{len(data)}"
        return _Answer(206, [("Content-Range", content_range)], body)

    def _manifest(self, request: Recorded, repository: str, name: str, body: bytes) -> _Answer:
        if request.method == "PUT":
            media_type = request.headers.get("content-type", "")
            self.add_manifest(repository, body, name, media_type=media_type)
            subject = json.loads(body).get("subject")
            named = [("OCI-Subject", subject["digest"])] if subject and self.referrers_api else []
            return _Answer(201, named)
        if (repository, name) not in self.manifests:
            return _Answer(404)
        media_type, raw = self.manifests[repository, name]
        digest = f"sha256:{hashlib.sha256(raw).hexdigest()}"
        return _Answer(200, [("Content-Type", media_type), ("Docker-Content-Digest", digest)], raw)

    def _referrers(self, request: Recorded, repository: str, digest: str) -> _Answer:
        if not self.referrers_api:
            return _Answer(404)
        found = []
        for (where, name), (media_type, raw) in self.manifests.items():
            document = json.loads(raw)
            by_digest = where == repository and name.startswith("sha256:")
            if by_digest and document.get("subject", {}).get("digest") == digest:
                kind = document.get("artifactType", document["config"]["mediaType"])
                entry = {"digest": name, "size": len(raw), "artifactType": kind}
                found.append({"mediaType": media_type, **entry})
        start = int(request.query.get("start", ["0"])[0])
        end = start + self.referrers_page
        headers = [("Content-Type", OCI_PLATFORM_LIST)]
        if end < len(found):
            headers.append(("Link", f'<{request.path}?start={end}>; rel="next"'))
        listed = {"schemaVersion": 2, "mediaType": OCI_PLATFORM_LIST, "manifests": found[start:end]}
        return _Answer(200, headers, json.dumps(listed).encode())

    def _upload(self, request: Recorded, name: str, body: bytes) -> _Answer:
        if request.method == "POST":
            name = f"upload-{next(self._numbers)}"
            self._uploads[name] = bytearray()
        elif name not in self._uploads:
            return _Answer(404)
        self._uploads[name] += body
        if request.method != "PUT":
            repository = request.path.partition("/blobs/")[0]
            return _Answer(202, [("Location", f"{repository}/blobs/uploads/{name}?state=1")])
        data = bytes(self._uploads.pop(name))
        if request.query.get("digest") != [f"sha256:{hashlib.sha256(data).hexdigest()}"]:
            return _Answer(400)
        self.add_blob(data)
        return _Answer(201)


@asynccontextmanager
async def fault_registry(tls: ssl.SSLContext | None = None) -> AsyncIterator[FaultRegistry]:
    """Serve a registry on a free loopback port for as long as the block lasts, with TLS if given
    a server's context."""
    async with trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        port = listeners[0].socket.getsockname()[1]
        registry = FaultRegistry(f"127.0.0.1:{port}")

        async def serve(stream: trio.abc.Stream) -> None:
            if tls is not None:
                stream = trio.SSLStream(stream, tls, server_side=True, https_compatible=True)
            registry.connections += 1
            registry.most_connections = max(registry.most_connections, registry.connections)
            try:
                await _serve(registry, stream)
            finally:
                registry.connections -= 1

        nursery.start_soon(trio.serve_listeners, serve, listeners)
        yield registry
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def dead_host() -> AsyncIterator[str]:
    """A host and port where nobody listens, which nobody else gets meanwhile."""
    with trio.socket.socket() as reserved:
        await reserved.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{reserved.getsockname()[1]}"


async def _serve(registry: FaultRegistry, stream: trio.abc.Stream) -> None:
    """One connection, until either side closes it."""
    connection = h11.Connection(h11.SERVER)
    try:
        async with stream:
            while await _exchange(registry, stream, connection):
                connection.start_next_cycle()
    except (trio.BrokenResourceError, h11.RemoteProtocolError):
        pass  # the client went away, or did not like our certificate


async def _exchange(
    registry: FaultRegistry, stream: trio.abc.Stream, connection: h11.Connection
) -> bool:
    """One request and its answer; whether the connection can go on."""
    event = await _next_event(stream, connection)
    if not isinstance(event, h11.Request):
        return False
    body = bytearray()
    while not isinstance(part := await _next_event(stream, connection), h11.EndOfMessage):
        if not isinstance(part, h11.Data):
            return False
        body += part.data
    target = urlsplit(event.target.decode())
    headers: dict[str, str] = {}
    for name, value in event.headers:
        before = headers.get(name.decode())
        headers[name.decode()] = ", ".join(filter(None, (before, value.decode())))
    request = Recorded(event.method.decode(), target.path, parse_qs(target.query), headers)
    registry.requests.append(request)
    fault = registry.fault_for(request)
    if fault.gate is not None:
        await fault.gate.wait()
    if fault.ignore_range:
        request.headers.pop("range", None)
    answer = registry.answer(request, bytes(body))
    if fault.status is not None:
        answer = _Answer(fault.status, [], fault.body)
    request.status = answer.status
    return await _send(stream, connection, request, answer, fault)


async def _send(
    stream: trio.abc.Stream,
    connection: h11.Connection,
    request: Recorded,
    answer: _Answer,
    fault: Fault,
) -> bool:
    content = answer.body[: len(answer.body) - fault.shorten] + b"?" * fault.lengthen
    if fault.flip is not None:
        flipped = bytes([content[fault.flip] ^ 0xFF])
        content = content[: fault.flip] + flipped + content[fault.flip + 1 :]
    replaced = {name.lower() for name, _ in fault.headers}
    headers = [pair for pair in answer.headers if pair[0].lower() not in replaced]
    headers += [("Content-Length", str(len(content))), *fault.headers]
    head = h11.Response(status_code=answer.status, headers=headers, reason=b"")
    await stream.send_all(connection.send(head) or b"")
    end = next((n for n in (fault.cut, fault.stall) if n is not None), len(content))
    if request.method != "HEAD":
        for start in range(0, end, _BLOCK):
            block = content[start : min(start + _BLOCK, end)]
            await stream.send_all(connection.send(h11.Data(data=block)) or b"")
            request.sent += len(block)
    if fault.cut is not None:
        return False
    if fault.stall is not None:
        while await stream.receive_some(_BLOCK):
            pass
        return False
    await stream.send_all(connection.send(h11.EndOfMessage()) or b"")
    return connection.our_state is h11.DONE and connection.their_state is h11.DONE


async def _next_event(
    stream: trio.abc.Stream, connection: h11.Connection
) -> h11.Event | type[h11.ConnectionClosed] | None:
    while (event := connection.next_event()) is h11.NEED_DATA:
        if connection.they_are_waiting_for_100_continue:
            go = h11.InformationalResponse(status_code=100, headers=[])
            await stream.send_all(connection.send(go) or b"")
        connection.receive_data(await stream.receive_some(_BLOCK))
    assert event is not h11.PAUSED
    return event  # type: ignore[return-value]
