"""The daemon's configuration file, TOML: every key is optional, every unknown one is refused."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Literal

import msgspec

from snapshotter.daemon.errors import ConfigError

DEFAULT_CONFIG = Path("/etc/firstbyte/config.toml")
DEFAULT_ROOT = Path("/var/lib/firstbyte")
DEFAULT_STATE = Path("/run/firstbyte")
SOCKET_NAME = "firstbyte.sock"

_UNKNOWN = re.compile(
    r"Object contains unknown field `(?P<field>[^`]*)`(?: - at `\$\.?(?P<at>.*)`)?"
)


class RegistryConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How registries are reached. `config_path` is a tree of hosts.toml files, as containerd's."""

    config_path: Path = Path("/etc/containerd/certs.d")


class ImagesConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which images are served lazily.

    `trust` lists whose file indexes are used: one that the image itself pins (`annotation`), one
    that is attached to it in the registry (`referrer`). With `build` the node builds one where
    there is none, by reading all of the image once; else containerd pulls such an image. `never`
    are patterns (fnmatch) of references that containerd always pulls.
    """

    trust: tuple[Literal["annotation", "referrer"], ...] = ("annotation", "referrer")
    build: bool = True
    never: tuple[str, ...] = ()


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All of it. `address` None is a socket in the state directory."""

    root: Path = DEFAULT_ROOT
    state: Path = DEFAULT_STATE
    address: Path | None = None
    registry: RegistryConfig = RegistryConfig()
    images: ImagesConfig = ImagesConfig()

    @property
    def socket(self) -> Path:
        """Where containerd finds the daemon."""
        return self.address or self.state / SOCKET_NAME


def load(path: Path | None) -> Config:
    """The configuration in a file; None is the usual place, where it may be missing.

    Raises ConfigError.
    """
    try:
        text = (path or DEFAULT_CONFIG).read_bytes()
    except FileNotFoundError as error:
        if path is None:
            return Config()
        raise ConfigError(f"{path} does not exist") from error
    except OSError as error:
        raise ConfigError(f"cannot read {path or DEFAULT_CONFIG}: {error.strerror}") from error
    return parse(text, str(path or DEFAULT_CONFIG))


def parse(text: bytes, name: str) -> Config:
    """Read a configuration; `name` is what errors call it. Raises ConfigError."""
    try:
        config = msgspec.toml.decode(text, type=Config, dec_hook=_decode_path)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{name}: {_explain(text, str(error))}") from error
    for key, path in (("root", config.root), ("state", config.state), ("address", config.address)):
        if path is not None and not path.is_absolute():
            raise ConfigError(f"{name}: {key} is not an absolute path: {path}")
    return config


def encode(config: Config) -> str:
    """A configuration as an argument of the daemon's process."""
    return msgspec.json.encode(config, enc_hook=str).decode()


def decode(text: str) -> Config:
    """What `encode` wrote."""
    return msgspec.json.decode(text, type=Config, dec_hook=_decode_path)


def _decode_path(kind: type, value: object) -> Path:
    if kind is not Path or not isinstance(value, str):
        raise ValueError("Expected a path")
    return Path(value)


def _explain(text: bytes, problem: str) -> str:
    """msgspec's words, with the line of an unknown key and the key that may have been meant."""
    match = _UNKNOWN.search(problem)
    if not match:
        words, _, place = problem.partition(" - at `$.")
        return f"{place.rstrip('`')}: {words}" if place else problem
    field, section = match["field"], match["at"] or ""
    kind = {"": Config, "registry": RegistryConfig, "images": ImagesConfig}.get(section, Config)
    near = difflib.get_close_matches(field, kind.__struct_fields__, n=1)
    key = f"{section}.{field}" if section else field
    words = f"unknown key {key!r}"
    if line := _line_of(text.decode(errors="replace"), section, field):
        words = f"line {line}: {words}"
    return f"{words}; did you mean {near[0]!r}?" if near else words


def _line_of(text: str, section: str, field: str) -> int | None:
    """Where a key or a table of that name is; None if it is written in an unusual way."""
    current = ""
    for number, line in enumerate(text.splitlines(), 1):
        if table := re.match(r"\s*\[\s*([^\[\]]+?)\s*\]", line):
            current = table[1]
            if not section and current.split(".")[0].strip("\"' ") == field:
                return number
        elif current == section and re.match(rf"""\s*["']?{re.escape(field)}["']?\s*[=.]""", line):
            return number
    return None
