"""Platforms: what a machine runs, and which entry of a platform list fits it best.

Normalisation and the order of preference are containerd's (`platforms` package, `database.go`
and `compare.go`): amd64 falls back through its micro-architecture levels and then to 386, arm
through its versions, arm64 to arm.
"""

from __future__ import annotations

import platform as machine
import re
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from snapshotter.registry.errors import InvalidReferenceError, NotFoundError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from snapshotter.registry.manifest import Descriptor

_ARCHITECTURES = {
    "x86_64": "amd64",
    "x86-64": "amd64",
    "i386": "386",
    "i486": "386",
    "i586": "386",
    "i686": "386",
    "aarch64": "arm64",
    "armhf": "arm",
    "armel": "arm",
}
_ARM_MACHINE = re.compile(r"armv([5-8])[a-z]*")  # uname's armv7l, armv6l, …
_OSES = {"macos": "darwin"}
_PART = re.compile(r"[A-Za-z0-9_.-]+")

_KNOWN_OSES = frozenset({"linux", "windows", "darwin", "freebsd", "netbsd", "openbsd", "wasi"})


@dataclass(frozen=True, slots=True)
class Platform:
    """A normalised operating system, architecture and variant (empty: the architecture's own)."""

    os: str
    architecture: str
    variant: str = ""

    def __str__(self) -> str:
        return "/".join(filter(None, (self.os, self.architecture, self.variant)))

    @classmethod
    def normalised(cls, os: str, architecture: str, variant: str = "") -> Platform:
        """A platform in Go's names, whichever names it was given in."""
        os, architecture, variant = os.lower(), architecture.lower(), variant.lower()
        if architecture == "armel":
            variant = "v6"
        elif match := _ARM_MACHINE.fullmatch(architecture):
            architecture, variant = "arm", f"v{match[1]}"
        architecture = _ARCHITECTURES.get(architecture, architecture)
        if variant.isdecimal():
            variant = f"v{variant}"
        match architecture, variant:
            case ("amd64", "v1") | ("arm64", "v8") | ("386", _):
                variant = ""
            case ("arm", ""):
                variant = "v7"
        return cls(_OSES.get(os, os), architecture, variant)

    @classmethod
    def host(cls) -> Platform:
        """The platform of this machine."""
        return cls.normalised(sys.platform, machine.machine())

    @classmethod
    def parse(cls, text: str) -> Platform:
        """Read `os/arch[/variant]`, or one of os and arch alone: the other is this machine's.

        Raises InvalidReferenceError.
        """
        parts = text.split("/")
        if not 1 <= len(parts) <= 3 or not all(map(_PART.fullmatch, parts)):
            raise InvalidReferenceError(
                f"malformed platform {text[:80]!r}", hint="os/arch[/variant], as in linux/arm64"
            )
        if len(parts) > 1:
            return cls.normalised(*parts)
        host = cls.host()
        if _OSES.get(text.lower(), text.lower()) in _KNOWN_OSES:
            return cls.normalised(text, host.architecture, host.variant)
        return cls.normalised(host.os, text)

    def acceptable(self) -> list[Platform]:
        """All platforms whose programs this one runs, the best first."""
        found = [self]
        level = int(self.variant[1:]) if re.fullmatch(r"v[0-9]", self.variant) else 0
        match self.architecture:
            case "amd64":
                found += [
                    self.normalised(self.os, "amd64", f"v{n}") for n in range(level - 1, 0, -1)
                ]
                found.append(Platform(self.os, "386"))
            case "arm":
                found += [Platform(self.os, "arm", f"v{n}") for n in range(level - 1, 4, -1)]
            case "arm64":
                if level > 8:
                    found.append(Platform(self.os, "arm64"))
                found += [Platform(self.os, "arm", f"v{n}") for n in range(8, 4, -1)]
        return found


def select(entries: Sequence[Descriptor], wanted: Platform, name: str) -> Descriptor:
    """The entry of a platform list that fits `wanted` best; of equals, the first.

    Entries that are no images are passed over: attestations say `unknown/unknown`, other
    artifacts carry an artifact type. An entry that does not state its platform is taken only when
    none that does fits. Raises NotFoundError, listing what there is, if nothing fits; `name` is
    the image's.
    """
    images = [entry for entry in entries if _is_image(entry)]
    stated = [
        (e, Platform.normalised(p.os, p.architecture, p.variant))
        for e in images
        if (p := e.platform) is not None
    ]
    for candidate in wanted.acceptable():
        for entry, offered in stated:
            if offered == candidate:
                return entry
    for entry in images:
        if entry.platform is None:
            return entry
    available = ", ".join(sorted({str(offered) for _, offered in stated})) or "none"
    raise NotFoundError(
        f"{name} has no image for {wanted}",
        hint=f"choose one with --platform; available: {available}",
    )


def _is_image(entry: Descriptor) -> bool:
    unknown = entry.platform is not None and "unknown" in (
        entry.platform.os,
        entry.platform.architecture,
    )
    return not unknown and not entry.artifact_type
