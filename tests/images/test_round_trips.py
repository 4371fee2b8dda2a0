"""How many round trips to a registry lie between a name and an image that can be mounted."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from snapshotter.daemon.knowledge import Knowledge
from snapshotter.daemon.lookup import Lookup
from snapshotter.daemon.room import Room
from snapshotter.images.discovery import FoundIndex, Trust, look_up
from snapshotter.registry.credentials import CredentialStore
from snapshotter.registry.image import find_manifest
from snapshotter.registry.locations import Locations
from snapshotter.registry.platform import Platform
from snapshotter.registry.transport import Response, Transport
from tests.support.blobs import sample_bytes
from tests.support.instance import firstbyte
from tests.support.layouts import write_layout
from tests.support.registry import RunningRegistry, skopeo_push
from tests.support.tars import file, tar

if TYPE_CHECKING:
    from pathlib import Path

BOTH = (Trust.ANNOTATION, Trust.REFERRER)


class Rounds(Transport):
    """Counts HTTP requests, and the round trips they take: it answers those of a round together,
    when whoever asks can do nothing more without an answer."""

    def __init__(self) -> None:
        super().__init__()
        self.requests: list[str] = []
        self.rounds = 0
        self._waiting: list[trio.Event] = []

    async def open(self, method: str, url: str, *args: Any, **options: Any) -> Response:
        self.requests.append(f"{method} {url.partition('/v2/')[2]}")
        turn = trio.Event()
        self._waiting.append(turn)
        await turn.wait()
        return await super().open(method, url, *args, **options)

    async def answer(self) -> None:
        while True:
            await wait_all_tasks_blocked(0.05)
            if self._waiting:
                self.rounds += 1
                waiting, self._waiting = self._waiting, []
                for turn in waiting:
                    turn.set()


@pytest.fixture(scope="module")
def image(registry: RunningRegistry, tmp_path_factory: pytest.TempPathFactory) -> str:
    layout = tmp_path_factory.mktemp("layout")
    write_layout(layout, [tar(file(b"data", sample_bytes(700_000)))])
    reference = registry.reference("plain")
    skopeo_push(layout, reference)
    firstbyte("index", "build", reference, "--push")
    return reference


@pytest.fixture(scope="module")
def converted(registry: RunningRegistry, image: str) -> str:
    reference = registry.reference("converted")
    firstbyte("convert", image, reference)
    return reference


async def found_by(transport: Transport, reference: str) -> FoundIndex | None:
    source = Locations(transport, CredentialStore()).source(reference)
    _, found = await look_up(source, await find_manifest(source, Platform.host()), BOTH)
    return found


async def test_two_when_the_image_pins_its_index(converted: str) -> None:
    async with Rounds() as transport, trio.open_nursery() as nursery:
        nursery.start_soon(transport.answer)
        found = await found_by(transport, converted)
        nursery.cancel_scope.cancel()
    assert found is not None
    assert found.trust is Trust.ANNOTATION
    assert transport.rounds == 2, transport.requests
    assert len(transport.requests) == 3


async def test_three_when_it_is_among_the_referrers(image: str) -> None:
    """Debian's registry is without the referrers API, which costs one request more, once."""
    async with Rounds() as transport, trio.open_nursery() as nursery:
        nursery.start_soon(transport.answer)
        for requests in (5, 4):
            transport.rounds = 0
            transport.requests.clear()
            found = await found_by(transport, image)
            assert found is not None
            assert found.trust is Trust.REFERRER
            assert transport.rounds == 3, transport.requests
            assert len(transport.requests) == requests
        nursery.cancel_scope.cancel()


async def test_two_when_the_image_is_named_by_its_digest(image: str, tmp_path: Path) -> None:
    """As containerd names it."""
    (tmp_path / "images").mkdir()
    async with Rounds() as transport, trio.open_nursery() as nursery:
        nursery.start_soon(transport.answer)
        tagged = Locations(transport, CredentialStore()).source(image)
        manifest = await find_manifest(tagged, Platform.host())
        reference = f"{image.rpartition(':')[0]}@{manifest.descriptor.digest}"
        source = Locations(transport, CredentialStore()).source(reference)
        lookup = Lookup(Knowledge(tmp_path), Room(), BOTH)
        transport.rounds = 0
        transport.requests.clear()
        resolved = await lookup.resolve(source, reference, "")
        _, found = await lookup.find(
            source,
            resolved,
            given=None,
            may_build=False,
            on_pack=lambda _: None,
            on_raw=lambda _: lambda _: None,
            report=lambda _: None,
        )
        assert found.trust is Trust.REFERRER
        assert transport.rounds == 2, transport.requests
        nursery.cancel_scope.cancel()
