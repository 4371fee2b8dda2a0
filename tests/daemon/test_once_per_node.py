"""However many starts of one image there are, the registry is asked for it once."""

from __future__ import annotations

import hashlib
import random
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from snapshotter.daemon import client, protocol
from snapshotter.daemon.places import Places
from tests.support.gateway import gateway
from tests.support.instance import firstbyte, instance
from tests.support.layouts import write_layout
from tests.support.registry import docker_registry, skopeo_push
from tests.support.tars import file, tar

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.gateway import Gateway

STARTS = 50
FILES = {b"%d" % number: random.Random(number).randbytes(600_000) for number in range(30)}


def start(base: Path, reference: str, starts: int) -> None:
    """Mount it so many times at once, each mount with a reader of all files at once."""
    places = Places(base / "root", base / "state")

    def read(target: Path) -> None:
        for name, content in FILES.items():
            found = (target / name.decode()).read_bytes()
            assert hashlib.sha256(found).digest() == hashlib.sha256(content).digest()

    def one(number: int) -> None:
        target = base / f"tree-{number}"
        target.mkdir()
        request = protocol.MountRequest(reference=reference, target=str(target), plain_http=True)
        client.ask(places, request, start=None)
        read(target)

    with ThreadPoolExecutor(starts) as threads:
        list(threads.map(one, range(starts)))


def carried_for(starts: int, path: Gateway, reference: str) -> int:
    """The bytes that came from the registry until all of the image is local."""
    before = path.carried
    with instance() as node:
        node.start()
        start(node.base, reference, starts)
        node.succeed("mount", reference, node.directory("local"), "--wait-local", "--plain-http")
        node.succeed("daemon", "--stop")
    return path.carried - before


def test_fifty_starts_fetch_what_one_does(tmp_path: Path) -> None:
    write_layout(tmp_path / "layout", [tar(*(file(*one) for one in FILES.items()))])
    with docker_registry(tmp_path / "registry") as registry:
        skopeo_push(tmp_path / "layout", registry.reference("app"))
        firstbyte("index", "build", registry.reference("app"), "--push")
        with gateway(registry.host) as path:
            one = carried_for(1, path, path.reference("app"))
            many = carried_for(STARTS, path, path.reference("app"))
    size = sum(map(len, FILES.values()))
    # Readers begin at seek points that fill has yet to pass, more or less often: 1.09 and 1.11
    # times the image were seen.
    assert size < one < 1.3 * size
    assert size < many < 1.3 * size
