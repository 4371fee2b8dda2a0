"""What the daemon writes to its log: one line an event."""

from __future__ import annotations

import logging
import sys


def log_to_stderr() -> None:
    """Send the log to standard error, with times."""
    logging.basicConfig(
        level=logging.INFO,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    # It logs the URL of every request, and the signed ones of redirects are as good as a password.
    logging.getLogger("httpx").setLevel(logging.WARNING)
