"""What can go wrong in a benchmark."""

from __future__ import annotations

from index.errors import FirstByteError


class BenchError(FirstByteError):
    """Something that is measured, or measured against, did not work."""
