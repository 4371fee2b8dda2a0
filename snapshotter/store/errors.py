"""What can go wrong with data kept on the node."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from index.errors import FirstByteError

if TYPE_CHECKING:
    from pathlib import Path

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


class StoreError(FirstByteError):
    """The disk under a store refused to read or write."""


class StoreFullError(StoreError):
    """No space, or no quota, is left for the store."""


class StoreLockedError(StoreError):
    """Another process owns the store."""


def store_error(error: OSError, path: Path, doing: str) -> StoreError:
    """The typed form of what the operating system answered while `doing` something to `path`."""
    if error.errno in _FULL:
        return StoreFullError(
            f"{doing} {path}: {error.strerror}",
            hint="free some space there, or choose another directory with --root",
        )
    return StoreError(
        f"{doing} {path}: {error.strerror}",
        hint="the kernel log may say what is wrong with the disk",
    )
