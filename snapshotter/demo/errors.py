"""What can go wrong in the demo."""

from __future__ import annotations

from index.errors import FirstByteError


class DemoError(FirstByteError):
    """A part of the demo did not work: a program failed, or something was not ready in time."""
