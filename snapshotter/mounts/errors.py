"""What can go wrong with mounts, for those who call and those who read the message."""

from __future__ import annotations

from index.errors import FirstByteError


class MountError(FirstByteError):
    """The kernel refused a mount operation. `errno` is its reason, 0 if it was not asked."""

    def __init__(self, message: str, *, hint: str = "", errno: int = 0) -> None:
        super().__init__(message, hint=hint)
        self.errno = errno


class MountBusyError(MountError):
    """Something still uses the mount: an open file, a working directory, a mount on top."""


class MountPointError(MountError):
    """The directory cannot be used as a mount point, or is none."""
