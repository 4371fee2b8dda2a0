"""Why a call of containerd fails, in the words that containerd acts on.

`server.py` answers each class with the gRPC code of the same name; containerd decides by the code
alone (it goes on after ALREADY_EXISTS of Prepare, and forgets what is NOT_FOUND).
"""

from __future__ import annotations

from index.errors import FirstByteError


class SnapshotError(FirstByteError):
    """A call on a snapshot cannot be done."""


class NotFoundError(SnapshotError):
    """There is no snapshot of that name."""


class AlreadyExistsError(SnapshotError):
    """There is a snapshot of that name; of Prepare also: its target is there, nothing to unpack."""


class FailedPreconditionError(SnapshotError):
    """The snapshot is not in a state that allows the call, as when others are based on it."""


class InvalidArgumentError(SnapshotError):
    """The request makes no sense, whatever snapshots there are."""


class UnavailableError(SnapshotError):
    """It cannot be done now; the same request may succeed later."""


class AddressError(FirstByteError):
    """The socket for containerd cannot be opened."""
