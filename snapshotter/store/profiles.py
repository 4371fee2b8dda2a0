"""Startup profiles on the node, by the chain ID of an image's topmost layer.

They stay when an image is removed, because that is when the next start is cold. Images that differ
in how their layers are compressed, or in their configuration alone, have one.
"""

from __future__ import annotations

import logging
import re
import threading
from typing import TYPE_CHECKING

from index import profile as profiles
from index.errors import FirstByteError, FormatError
from snapshotter.store.durable import (
    discard_temporaries,
    make_directory,
    remove_file,
    write_file,
)

if TYPE_CHECKING:
    from pathlib import Path

    from index.profile import Profile

log = logging.getLogger(__name__)

MAX_PROFILES = 1000
"""Profiles that are kept, the latest ones: 20 MB if each has a thousand chunks."""

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


class ProfileStore:
    """`<root>/profiles/<hex of chain ID>.json`, each written as a whole, durably. Thread-safe."""

    def __init__(self, root: Path, *, writer: bool = True) -> None:
        """Raises StoreError if the directory cannot be made.

        Without `writer` it is only read and removed from, while a daemon may be writing.
        """
        self._directory = root / "profiles"
        self._lock = threading.Lock()
        if writer:
            make_directory(self._directory)
            discard_temporaries(self._directory)

    def get(self, chain_id: str) -> Profile | None:
        """The profile, or None if there is none; a damaged one is logged and counts as none."""
        path = self._path(chain_id)
        try:
            return profiles.decode(path.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, FirstByteError) as error:
            log.error("%s cannot be read: %s", path, error)
            return None

    def add(self, chain_id: str, run: Profile) -> Profile:
        """Merge one more run into what is known, and keep that. Raises StoreError."""
        with self._lock:
            known = self.get(chain_id)
            if known is not None and known.diff_ids == run.diff_ids:
                run = profiles.merge(known, run)
            write_file(self._path(chain_id), [profiles.encode(run)])
            for path in self._newest_first()[MAX_PROFILES:]:
                remove_file(path)
            return run

    def remove(self, chain_id: str) -> bool:
        """Forget a profile; whether there was one. Raises StoreError."""
        path = self._path(chain_id)
        found = path.exists()
        if found:
            remove_file(path)
        return found

    def chain_ids(self) -> list[str]:
        """Of all profiles, the latest first."""
        return [f"sha256:{path.stem}" for path in self._newest_first()]

    def _newest_first(self) -> list[Path]:
        def age(path: Path) -> float:
            try:
                return -path.stat().st_mtime
            except FileNotFoundError:  # removed just now
                return 0

        return sorted((path for path in self._directory.glob("*.json")), key=age)

    def _path(self, chain_id: str) -> Path:
        if not _DIGEST.fullmatch(chain_id):
            raise FormatError(f"{chain_id!r} is no SHA-256 digest")
        return self._directory / f"{chain_id.removeprefix('sha256:')}.json"
