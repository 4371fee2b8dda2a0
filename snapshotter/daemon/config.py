"""The daemon's configuration file, TOML: every key is optional, every unknown one is refused.

The structs here are all there is to say about a key: docs/configuration.md and the example that is
installed are made from them (scripts/make-config-reference).
"""

from __future__ import annotations

import ipaddress
import os
import re
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec

from snapshotter.daemon.config_check import (
    Problem,
    Wrong,
    described,
    dotted,
    first_problem,
    in_toml,
    line_of,
    shorten,
    syntax_problem,
)
from snapshotter.daemon.errors import ConfigError
from snapshotter.daemon.places import Places
from snapshotter.podman import rootless
from snapshotter.store.space import Amount, Bounds

if TYPE_CHECKING:
    from snapshotter.podman.rootless import User

DEFAULT_CONFIG = Path("/etc/firstbyte/config.toml")
DEFAULT_ROOT = Path("/var/lib/firstbyte")
DEFAULT_STATE = Path("/run/firstbyte")
SOCKET_NAME = "firstbyte.sock"

MAX_BYTES = 1 << 20
"""Of a configuration file. One that is larger is something else."""

# A unix socket's path has 107 bytes. Ours are made next to their place, which takes three bytes
# more. In the state directory the longest is the control socket's.
_ADDRESS_BYTES = 107 - 3
_STATE_BYTES = 107 - len(Places(Path(), Path("/")).socket.as_posix())

_LEAST = 64 << 20  # bytes: some images' start, and room to move

_REFERENCE = re.compile(r"[\w.:/@*?!\[\]-]+", re.ASCII)  # what references and patterns are made of
_TAGGED = re.compile(r".+/[^/]*[:@][^/]+")


def _short(limit: int) -> Wrong | None:
    return Wrong(f"the path is too long for a socket: {limit} bytes at most")


def _address_rule(path: Path) -> Wrong | None:
    return _short(_ADDRESS_BYTES) if len(os.fsencode(path)) > _ADDRESS_BYTES else None


def _state_rule(path: Path) -> Wrong | None:
    return _short(_STATE_BYTES) if len(os.fsencode(path)) > _STATE_BYTES else None


def _one_directory_rule(path: Path) -> Wrong | None:
    if ":/" in str(path):
        return Wrong("more than one directory is named", "the first one is what containerd heeds")
    return None


def _pattern_rule(pattern: str) -> Wrong | None:
    """A pattern that no reference can match is a mistake."""
    shown = in_toml(pattern)
    if not pattern:
        return Wrong("an empty pattern matches nothing")
    if not _REFERENCE.fullmatch(pattern):
        return Wrong(
            f"no reference can match {shown}",
            "patterns are as in a shell: *, ? and [...] stand for characters",
        )
    if pattern.count("[") != pattern.count("]"):
        return Wrong(f"{shown} has a bracket without its partner")
    if not re.search(r"[*?\[]", pattern) and not _TAGGED.fullmatch(pattern):
        full = pattern if "/" in pattern else f"docker.io/library/{pattern}"
        full = full if ":" in full.rpartition("/")[2] else f"{full}:*"
        return Wrong(f"{shown} is not a whole reference", f"did you mean {in_toml(full)}?")
    return None


def _amount(text: str) -> Amount | Wrong:
    try:
        return Amount.parse(text)
    except ValueError as error:
        return Wrong(f"{in_toml(text)}: {error}", 'write "50 GiB", "500 MB" or "40%"')


def _limit_rule(text: str) -> Wrong | None:
    amount = _amount(text)
    if isinstance(amount, Amount) and amount.of(_LEAST * 100) < _LEAST:
        return Wrong(f"{in_toml(text)} is too little to work with", '"64 MiB" and "1%" are least')
    return amount if isinstance(amount, Wrong) else None


def _keep_free_rule(text: str) -> Wrong | None:
    amount = _amount(text)
    if isinstance(amount, Amount) and amount.share > 0.9:
        return Wrong(f"{in_toml(text)} leaves no room for images", '"90%" is most')
    return amount if isinstance(amount, Wrong) else None


class RegistryConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How registries are reached."""

    config_path: Annotated[
        Path,
        described(
            "A tree of `hosts.toml` files with mirrors, certificates and headers of registries, "
            "in containerd's format. Name the directory that containerd has. It need not exist.",
            _one_directory_rule,
        ),
    ] = Path("/etc/containerd/certs.d")
    registries_conf: Annotated[
        Path,
        described(
            "The file in which podman and CRI-O are told of mirrors, with its drop-ins in the "
            "directory of the same name and `.d`. It is asked about registries that `config_path` "
            "says nothing of. It need not exist."
        ),
    ] = Path("/etc/containers/registries.conf")


class ImagesConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which images containerd gets lazily. The others it pulls the ordinary way."""

    trust: Annotated[
        tuple[Literal["annotation", "referrer"], ...],
        described(
            'Whose file indexes are used: `"annotation"` is one that the image itself names, by '
            'digest; `"referrer"` is one that was attached to the image in its registry, by '
            "whoever may push there. Indexes that this node has built are used in any case."
        ),
    ] = ("annotation", "referrer")
    build: Annotated[
        bool,
        described(
            "What to do with an image that has no file index: `true` reads all of it once and "
            "builds one on this node, `false` leaves it to containerd."
        ),
    ] = True
    never: Annotated[
        tuple[Annotated[str, described("", _pattern_rule)], ...],
        described(
            "Patterns of references that are never lazy, as in a shell: `*` stands for anything, "
            "slashes included. They are compared with whole references as containerd has them, "
            'such as `"docker.io/library/postgres:*"` or `"registry.example/legacy/*"`.'
        ),
    ] = ()


class MountsConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How the tree of a lazy image comes into the kernel."""

    mode: Annotated[
        Literal["auto", "erofs", "fuse"],
        described(
            '`"fuse"`: the daemon answers for every file and directory. `"erofs"`: the kernel '
            "reads the tree itself and asks the daemon for data alone, and not for that of layers "
            "that were on the node when it was mounted; needs Linux 6.12. "
            '`"auto"`: the best that works here.'
        ),
    ] = "auto"


class StoreConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How much of the disk below `root` images' data may take: bytes, or a share of that disk."""

    limit: Annotated[
        str,
        described(
            'The most that images\' data may take, such as `"50 GiB"` or `"40%"`; what containers '
            "write is not counted. Near it background downloads stop and images that nobody uses "
            "go; then goes what containers have not read for longest, and is fetched again when "
            "it is read.",
            _limit_rule,
        ),
    ] = "100%"
    keep_free: Annotated[
        str,
        described(
            "What is to stay free on the disk, whoever takes the rest. With less than that, "
            "background downloads stop and images that nobody uses go; with less than half of it, "
            "what containers read goes, too. The kubelet, which knows what it needs, acts first: "
            "its thresholds are 15 % and more.",
            _keep_free_rule,
        ),
    ] = "10%"

    @property
    def bounds(self) -> Bounds:
        return Bounds(limit=Amount.parse(self.limit), keep_free=Amount.parse(self.keep_free))


def _metrics_rule(text: str) -> Wrong | None:
    if not text:
        return None
    if text.startswith("/"):
        return _address_rule(Path(text))
    host, colon, port = text.rpartition(":")
    if not colon or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        return Wrong(f"{in_toml(text)} is neither HOST:PORT nor the path of a socket")
    try:
        ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return Wrong(f"{in_toml(host)} is no IP address", 'as in "127.0.0.1:9431"')
    return None


class MetricsConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Figures for Prometheus."""

    address: Annotated[
        str,
        described(
            'Where `GET /metrics` is answered: `"127.0.0.1:9431"`, or the path of a unix socket. '
            "Everybody who can connect can read. Without it nobody listens.",
            _metrics_rule,
        ),
    ] = ""


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where things are on the node."""

    root: Annotated[
        Path,
        described(
            "Images' data, snapshots and what containers write. Needs room, and ext4 or xfs below "
            "it. Made if it does not exist."
        ),
    ] = DEFAULT_ROOT
    state: Annotated[
        Path,
        described(
            "Sockets, mounts, locks: what a reboot may forget. Made if it does not exist.",
            _state_rule,
        ),
    ] = DEFAULT_STATE
    address: Annotated[
        Path | None,
        described(
            "The socket for containerd, the same as in containerd's configuration. Its directory "
            f"must exist, unless that is `state`. Without this key it is `{SOCKET_NAME}` in "
            "`state`.",
            _address_rule,
        ),
    ] = None
    registry: RegistryConfig = RegistryConfig()
    images: ImagesConfig = ImagesConfig()
    mounts: MountsConfig = MountsConfig()
    store: StoreConfig = StoreConfig()
    metrics: MetricsConfig = MetricsConfig()

    @property
    def socket(self) -> Path:
        """Where containerd finds the daemon."""
        return self.address or self.state / SOCKET_NAME


def usual_file() -> Path:
    """Where a configuration is looked for: a user's own, where that user's podman is served."""
    user = rootless.user()
    return user.config / "firstbyte/config.toml" if user else DEFAULT_CONFIG


def load(path: Path | None) -> Config:
    """The configuration in a file; None is the usual place, where it may be missing.

    Raises ConfigError.
    """
    return _load(path or usual_file(), rootless.user(), may_miss=path is None)


def load_system() -> Config:
    """The configuration of the machine's daemon, whoever asks. Raises ConfigError."""
    return _load(DEFAULT_CONFIG, None, may_miss=True)


def _load(path: Path, user: User | None, *, may_miss: bool) -> Config:
    try:
        with path.open("rb") as file:
            text = file.read(MAX_BYTES + 1)
    except FileNotFoundError as error:
        if not may_miss:
            raise ConfigError(f"{path} does not exist") from error
        text = b""
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    return parse(text, str(path), user)


def parse(text: bytes, name: str, user: User | None = None) -> Config:
    """Read a configuration; `name` is what errors call it, and `user` for whose podman it is, if it
    is not the machine's. Raises ConfigError.
    """
    if len(text) > MAX_BYTES:
        raise ConfigError(f"{name} is no configuration: it has more than {MAX_BYTES >> 20} MiB")
    try:
        document = text.decode()
        data = tomllib.loads(document)
    except UnicodeDecodeError as error:
        before = text.count(b"\n", 0, error.start)
        raise ConfigError(f"{name}, line {before + 1}: not UTF-8") from error
    except RecursionError as error:
        raise ConfigError(f"{name}: lists and tables are nested too deep") from error
    except ValueError as error:  # tomllib's own, and Python's for numbers of a thousand digits
        place, wrong = syntax_problem(error)
        where = f"{name}, {place}" if place else name
        raise ConfigError(f"{where}: {wrong.words}", hint=wrong.hint) from error
    if user is not None:
        _set_defaults_of(user, data)
    problem = first_problem(data, Config)
    if problem is None:
        config = msgspec.convert(data, Config, dec_hook=_decode_path)
        problem = _clash(config)
        if problem is None:
            return config
    line = line_of(document, problem.place)
    where = f"{name}, line {line}" if line else name
    raise ConfigError(
        f"{where}: {shorten(dotted(problem.place))}: {problem.wrong.words}",
        hint=problem.wrong.hint,
    )


def _set_defaults_of(user: User, data: dict[str, Any]) -> None:
    """What is elsewhere without root: directories, and the file with podman's mirrors."""
    data.setdefault("root", str(user.data / "firstbyte"))
    data.setdefault("state", str(user.runtime / "firstbyte"))
    mirrors = user.config / "containers/registries.conf"
    registry = data.setdefault("registry", {})
    if isinstance(registry, dict) and mirrors.exists():
        registry.setdefault("registries_conf", str(mirrors))


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


def _clash(config: Config) -> Problem | None:
    """What is wrong with keys that are right by themselves."""
    if config.root == config.state:
        key = "state" if config.state != DEFAULT_STATE else "root"
        return Problem((key,), Wrong("root and state are the same directory"))
    if config.address == Places(config.root, config.state).socket:
        return Problem(("address",), Wrong("this is where the daemon's own commands connect"))
    return None
