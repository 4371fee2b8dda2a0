"""What the daemon writes to its log: one line an event."""

from __future__ import annotations

import faulthandler
import logging
import os
import sys


def log_to_stderr() -> None:
    """Send the log to standard error, with times unless that is the journal, which has its own.

    What a signal such as the watchdog's SIGABRT ends says where it was.
    """
    faulthandler.enable()
    times = "" if "JOURNAL_STREAM" in os.environ else "%(asctime)s "
    logging.basicConfig(
        level=logging.INFO,
        format=f"{times}%(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    # It logs the URL of every request, and the signed ones of redirects are as good as a password.
    logging.getLogger("httpx").setLevel(logging.WARNING)
