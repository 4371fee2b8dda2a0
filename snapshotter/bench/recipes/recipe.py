"""What an image is made of: the part of an entry of a catalogue that says so."""

from __future__ import annotations

import hashlib

import msgspec


class MadeFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A text file of the image. `replace` puts it in the place of what packages have there."""

    path: str
    text: str
    mode: int = 0o644


class Recipe(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True
):
    """An image, layer by layer: Debian's base system, each of `packages` (lists of packages), each
    of `pip` (lists of requirements), a file of `data_mb` incompressible megabytes, and `files`.

    With `split` the last layer of packages is cut into so many. The rest is the image's
    configuration.
    """

    packages: list[list[str]] = []
    pip: list[list[str]] = []
    data_mb: int = 0
    files: list[MadeFile] = []
    split: int = 1
    command: list[str] = []
    user: str = ""
    directory: str = "/"
    environment: dict[str, str] = {}

    def key(self) -> str:
        """Equal for equal recipes, whatever else they might say; short, fit for names."""
        return hashlib.sha256(msgspec.json.encode(self)).hexdigest()[:12]
