"""What can go wrong between the command line and the daemon."""

from __future__ import annotations

from index.errors import FirstByteError


class DaemonError(FirstByteError):
    """The daemon cannot run, cannot be reached, or refused a request."""


class ControlProtocolError(DaemonError):
    """The other side of the control socket sent something that is no message of ours."""


class ConfigError(DaemonError):
    """The configuration file cannot be read or makes no sense."""


class NoIndexError(DaemonError):
    """An image has no file index, and none may be built."""
