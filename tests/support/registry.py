"""Debian's `docker-registry`, run for tests on a free loopback port with a directory of its own."""

from __future__ import annotations

import json
import socket
import subprocess
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import trustme

USERNAME = "alice"
PASSWORD = "correct horse"
_HTPASSWD = f"{USERNAME}:$2b$05$abcdefghijklmnopqrstuuHNbAKRhpaujgo33bRWs.NLUTJO3lOy2\n"  # bcrypt

_START_WITHIN = 20.0  # seconds


@dataclass(frozen=True)
class RunningRegistry:
    """A registry that answers. `host` is what references start with; `log` is what it wrote."""

    host: str
    storage: Path
    log: Path
    pid: int

    def reference(self, repository: str, tag: str = "latest") -> str:
        """The name of an image in this registry."""
        return f"{self.host}/{repository}:{tag}"

    def blob_path(self, digest: str) -> Path:
        """The file that a blob is stored in, to be damaged."""
        algorithm, _, value = digest.partition(":")
        blobs = self.storage / "docker/registry/v2/blobs"
        return blobs / algorithm / value[:2] / value / "data"


@contextmanager
def docker_registry(
    directory: Path, *, password: bool = False, ca: trustme.CA | None = None
) -> Iterator[RunningRegistry]:
    """Run a registry, with Basic authentication if `password`, with TLS if there is a `ca`."""
    directory.mkdir(parents=True, exist_ok=True)
    with socket.create_server(("127.0.0.1", 0)) as chosen:
        host = f"127.0.0.1:{chosen.getsockname()[1]}"
    http: dict[str, object] = {"addr": host, "secret": "not a secret"}
    if ca is not None:
        certificate = ca.issue_cert("127.0.0.1", "localhost")
        certificate.cert_chain_pems[0].write_to_path(str(directory / "cert.pem"))
        certificate.private_key_pem.write_to_path(str(directory / "key.pem"))
        http["tls"] = {
            "certificate": str(directory / "cert.pem"),
            "key": str(directory / "key.pem"),
        }
    storage = directory / "storage"
    config: dict[str, object] = {
        "version": 0.1,
        "log": {"level": "warn", "accesslog": {"disabled": True}},
        "storage": {"filesystem": {"rootdirectory": str(storage)}, "delete": {"enabled": True}},
        "http": http,
    }
    if password:
        (directory / "htpasswd").write_text(_HTPASSWD)
        config["auth"] = {"htpasswd": {"realm": "test", "path": str(directory / "htpasswd")}}
    path = directory / "config.yml"
    path.write_text(json.dumps(config))  # JSON is YAML
    log = directory / "registry.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            ["docker-registry", "serve", str(path)], stdout=output, stderr=output
        )
    try:
        _await_port(host, process, log)
        yield RunningRegistry(host, storage, log, process.pid)
    finally:
        process.terminate()
        process.wait(timeout=20)


def _await_port(host: str, process: subprocess.Popen[bytes], log: Path) -> None:
    name, _, port = host.partition(":")
    deadline = time.monotonic() + _START_WITHIN
    while True:
        try:
            socket.create_connection((name, int(port)), timeout=1).close()
        except OSError:
            if process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"docker-registry did not start: {log.read_text()}") from None
            time.sleep(0.02)
        else:
            return


def skopeo_push(layout: Path, reference: str) -> None:
    """Push the image `latest` of an OCI layout as an ordinary image, with an ordinary tool."""
    subprocess.run(
        [
            "skopeo",
            "copy",
            "--dest-tls-verify=false",
            f"oci:{layout}:latest",
            f"docker://{reference}",
        ],
        check=True,
        capture_output=True,
    )
