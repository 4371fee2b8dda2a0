"""What can go wrong, as one small tree of exceptions.

Every message is one line that names the thing and what is wrong with it; `hint` says what the
reader can do about it. Boundaries convert once: FUSE to errno, the command line to exit status.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


class FirstByteError(Exception):
    """The root. `hint` is a sentence for the person who has to act, or empty."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}: {self.hint}" if self.hint else self.message


class TarError(FirstByteError):
    """A layer's tar stream is malformed, truncated, or cannot be applied to a tree."""


class CodecError(FirstByteError):
    """A compressed stream is malformed, truncated, or holds more than it may."""


class FormatError(FirstByteError):
    """A file index (or the EROFS image in it) is malformed or breaks one of its own rules."""


class IntegrityError(FirstByteError):
    """Bytes do not have the digest they were promised to have."""


class UnsupportedError(FirstByteError):
    """Well-formed input of a kind that FirstByte does not handle."""


@contextmanager
def about(what: str) -> Iterator[None]:
    """Put "`what`: " in front of the message of errors of this module from within the block."""
    try:
        yield
    except (TarError, CodecError, FormatError, IntegrityError, UnsupportedError) as error:
        raise type(error)(f"{what}: {error.message}", hint=error.hint) from error
