"""Content digests: `sha256:` and 64 lower-case hexadecimal digits.

Source: OCI image spec 1.1, descriptor.md, "Digests".
"""

from __future__ import annotations

import hashlib
import re

from index.errors import IntegrityError, UnsupportedError
from snapshotter.registry.errors import ProtocolError

SHA256 = re.compile(r"sha256:[0-9a-f]{64}")
_OTHER = re.compile(r"[a-z0-9]+(?:[+._-][a-z0-9]+)*:[A-Za-z0-9=_-]+")


def check_digest(text: str) -> str:
    """Return `text` if it is a sha256 digest.

    Raises UnsupportedError for another algorithm's digest, ProtocolError for anything else.
    """
    if SHA256.fullmatch(text):
        return text
    if _OTHER.fullmatch(text) and not text.startswith("sha256:"):
        raise UnsupportedError(
            f"digest of another kind than sha256, {text[:80]}",
            hint="FirstByte reads images with sha256 digests only",
        )
    raise ProtocolError(f"malformed digest {text[:80]!r}")


def digest_of(data: bytes) -> str:
    """The digest of `data`."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def verify(data: bytes, digest: str, what: str) -> None:
    """Raise IntegrityError unless `data` has `digest`; `what` names it in the message."""
    actual = digest_of(data)
    if actual != digest:
        raise IntegrityError(
            f"{what} has digest {actual}, not {digest}",
            hint="the registry, a proxy or a disk damaged it, or somebody replaced it",
        )


class Verifier:
    """Checks a blob that passes by in pieces against its digest and size; keeps none of it."""

    def __init__(self, digest: str, size: int, what: str) -> None:
        self._digest = digest
        self._size = size
        self._what = what
        self._hash = hashlib.sha256()
        self._seen = 0

    def update(self, piece: bytes) -> None:
        """Take the next piece. IntegrityError as soon as there is too much."""
        self._seen += len(piece)
        if self._seen > self._size:
            raise IntegrityError(f"{self._what} has more than its {self._size} bytes")
        self._hash.update(piece)

    def finish(self) -> None:
        """IntegrityError unless what came was the blob."""
        if self._seen < self._size:
            raise IntegrityError(f"{self._what} has {self._seen} bytes, not {self._size}")
        actual = f"sha256:{self._hash.hexdigest()}"
        if actual != self._digest:
            raise IntegrityError(f"{self._what} has digest {actual}, not {self._digest}")
