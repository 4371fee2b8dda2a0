"""Has the images that are measured, in their variants, in the registry behind the link."""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from snapshotter.bench.coldstart.results import Facts
from snapshotter.bench.errors import BenchError
from snapshotter.demo.lazy import build_index, convert
from snapshotter.images.discovery import find_index
from snapshotter.registry.credentials import CredentialStore
from snapshotter.registry.digests import digest_of
from snapshotter.registry.locations import Locations
from snapshotter.registry.platform import Platform
from snapshotter.registry.transport import Transport

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from snapshotter.bench.coldstart.catalogue import Image
    from snapshotter.bench.link.link import DistantRegistry
    from snapshotter.bench.recipes.build import Builder
    from snapshotter.demo.workspace import Workspace
    from snapshotter.registry.manifest import Manifest

CONVERTED = "converted"
"""The variant whose layers FirstByte has recompressed."""

PROFILED = "profile"
"""The variant whose file index comes with a startup pack, of starts that were recorded."""


class Publisher:
    """Puts images into the registry when they are asked for, each variant once."""

    def __init__(
        self,
        workspace: Workspace,
        registry: DistantRegistry,
        builder: Builder,
        record: Callable[[Image, str, Path], None],
        say: Callable[[str], None],
        kept: Path | None = None,
    ) -> None:
        """`record` starts an image in a repository and writes its startup profile into a file. What
        is in the registry is noted in the directory `kept`, if that is kept, too."""
        self._workspace = workspace
        self._registry = registry
        self._builder = builder
        self._record = record
        self._say = say
        self._kept = kept
        self._repositories: set[str] = set()

    def repository(self, image: Image, variant: str) -> str:
        """The repository of an image as a mode needs it. Takes a while the first time.

        Raises DemoError if what prepares it fails.
        """
        made_of = image.recipe.key() if image.recipe else digest_of(image.reference.encode())[-12:]
        name = "-".join([image.name, *([variant] if variant else []), made_of])
        note = self._kept / f"{name}.prepared" if self._kept else None
        if name not in self._repositories and not (note and note.exists()):
            self._prepare(image, variant, name)
            if note:
                note.touch()
        self._repositories.add(name)
        return name

    def _prepare(self, image: Image, variant: str, name: str) -> None:
        if not variant:
            self._copy(image, name)
            return
        original = self.repository(image, "")
        if variant == CONVERTED:
            self._say(f"{image.name}: converting")
            convert(self._workspace, self._direct(original), self._direct(name))
            return
        self._say(f"{image.name}: recording starts")
        profile = self._workspace.path / f"{name}.profile"
        self._record(image, original, profile)
        self._copy(image, name, profile)

    def facts(self, image: Image) -> Facts:
        """What can be said of an image without starting it."""
        manifest = trio.run(_manifest, self._direct(self.repository(image, "")))
        return Facts(
            reference=image.reference or "built from packages",
            group=image.group,
            layers=len(manifest.layers),
            compressed_bytes=sum(layer.size for layer in manifest.layers),
        )

    def profile_bytes(self, image: Image) -> int:
        """The size of an image's startup pack. Takes a while if there is none yet."""
        return trio.run(_pack_size, self._direct(self.repository(image, PROFILED)))

    def layers(self, image: Image) -> list[Path]:
        """The files in which the registry stores an image's layers."""
        manifest = trio.run(_manifest, self._direct(self.repository(image, "")))
        return [self._registry.stored(layer.digest) for layer in manifest.layers]

    def _copy(self, image: Image, repository: str, profile: Path | None = None) -> None:
        source = image.reference
        if image.recipe:
            source = self._builder.image(image.name, image.recipe)
        self._say(f"{image.name}: copying into the registry, building the file index")
        self._registry.registry.copy_in(source, f"{repository}:latest")
        build_index(self._workspace, self._direct(repository), profile)

    def _direct(self, repository: str) -> str:
        return f"{self._registry.direct}/{repository}:latest"


async def _manifest(reference: str) -> Manifest:
    async with Transport() as transport:
        source = Locations(transport, CredentialStore()).source(reference)
        return (await source.resolve(Platform.host())).manifest


async def _pack_size(reference: str) -> int:
    async with Transport() as transport:
        source = Locations(transport, CredentialStore()).source(reference)
        found = await find_index(source, await source.resolve(Platform.host()))
    if found is None or found.pack is None:
        raise BenchError(f"{reference} has no startup pack")
    return found.pack.size
