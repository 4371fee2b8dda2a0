"""`python -m snapshotter.daemon`: the daemon, as the client starts it when none runs."""

from __future__ import annotations

import argparse
import atexit
import gc
import logging
import os
import sys
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from snapshotter.daemon import protocol


def main() -> int:
    """Run until the last mount has gone. The starter reads from `--ready` how the start went."""
    gc.disable()  # `process.run` enables it: to look for cycles during imports takes 25 ms
    import trio

    from index.errors import FirstByteError
    from snapshotter.daemon import config, process, protocol
    from snapshotter.daemon.logs import log_to_stderr

    parser = argparse.ArgumentParser(prog="snapshotter.daemon", description=__doc__)
    parser.add_argument("--config", type=config.decode, required=True, help="as JSON")
    parser.add_argument("--ready", type=int, required=True, help="descriptor of a socket")
    options = parser.parse_args()
    log_to_stderr()
    atexit.register(gc.freeze)  # else Python looks for cycles for 0.1 s before it ends

    def tell(message: protocol.FromDaemon) -> None:
        with os.fdopen(options.ready, "wb") as starter:
            starter.write(protocol.encode(message))

    def ready() -> None:
        tell(protocol.Hello(protocol.VERSION, os.getpid()))

    try:
        trio.run(partial(process.run, options.config, stay=False, ready=ready))
    except FirstByteError as error:
        logging.getLogger("snapshotter.daemon").error("%s", error)
        tell(protocol.Failed(error.message, error.hint))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
