"""What the command line and the daemon say to each other: one JSON object a line, both ways.

The daemon speaks first (Hello), so that a client knows that a living daemon has taken its
connection and that its request will not be lost in one that is just ending. Then one request, any
number of Progress lines, and exactly one reply. Nothing here does I/O.
"""

from __future__ import annotations

from typing import Generic, TypeVar

import msgspec

from snapshotter.daemon.errors import ControlProtocolError

VERSION = 1
"""Raised when a message changes its meaning; client and daemon of different versions part.

But for Hello, HandOverRequest, StopRequest and their replies, which never change: an upgrade, and a
way back, are between two versions.
"""

MAX_MESSAGE = 16 << 20
"""Bytes of the longest line: the disk usage of some twenty thousand layers."""

UNSERVED = "unserved"
"""The state of an image that podman knows, and that cannot be read."""

_T = TypeVar("_T")


class Hello(msgspec.Struct, frozen=True, tag="hello"):
    """The daemon's greeting."""

    version: int
    pid: int


class MountRequest(msgspec.Struct, frozen=True, kw_only=True, tag="mount"):
    """Mount an image at the directory `target` (absolute). `platform` empty: the machine's own.

    `index` is the absolute path of a file index to use, or empty: one is looked for, or built.
    With `wait_local` the reply comes when all of the image is on this node. `mode` is how it is to
    be served: `native`, `erofs`, `fuse`, or empty for the best there is.
    """

    reference: str
    target: str
    platform: str = ""
    plain_http: bool = False
    index: str = ""
    wait_local: bool = False
    mode: str = ""


class UmountRequest(msgspec.Struct, frozen=True, tag="umount"):
    """Take down the mount at the directory `target` (absolute)."""

    target: str


class PodmanAddRequest(msgspec.Struct, frozen=True, kw_only=True, tag="podman add"):
    """Put an image into podman's image store. Fields as of MountRequest; `graph_roots` are where
    podman keeps containers that may use images of the store. With `layers` they are not merged."""

    reference: str
    graph_roots: list[str]
    layers: bool = False
    platform: str = ""
    index: str = ""


class PodmanRemoveRequest(msgspec.Struct, frozen=True, tag="podman remove"):
    """Take an image out of podman's image store, by name or ID. The reply is Unmounted."""

    image: str
    graph_roots: list[str]


class HandedCredential(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A user's name and password, or an identity token; none at all if everything is empty."""

    username: str = ""
    password: str = ""
    identity_token: str = msgspec.field(default="", name="identityToken")

    def __repr__(self) -> str:  # it might get into a log
        return f"{type(self).__name__}(...)"


class PodmanCredentialsRequest(msgspec.Struct, frozen=True, tag="podman credentials"):
    """Use these for images, by reference, for a while. The reply is CredentialsTaken."""

    credentials: dict[str, HandedCredential]


class StatusRequest(msgspec.Struct, frozen=True, tag="status"):
    """Tell what is mounted."""


class StopRequest(msgspec.Struct, frozen=True, tag="stop"):
    """Take down everything and end."""


class HandOverRequest(msgspec.Struct, frozen=True, tag="hand over"):
    """End, and leave everything to the daemon that asks."""


class CollectRequest(msgspec.Struct, frozen=True, kw_only=True, tag="collect"):
    """Delete from the store what nothing names and what its bounds ask for; with `everything` all
    that is not in use. With `dry_run` nothing is deleted."""

    everything: bool = False
    dry_run: bool = False


class DiskUsageRequest(msgspec.Struct, frozen=True, tag="disk usage"):
    """Tell what takes how much of the store."""


class WhyRequest(msgspec.Struct, frozen=True, tag="why"):
    """Tell what the start of an open image waited for: named by a directory it is mounted at, its
    reference, or its digest or the beginning of that."""

    name: str


class Progress(msgspec.Struct, frozen=True, tag="progress"):
    """`done` of `total` bytes of one piece of work; the total may be unknown."""

    task: str
    done: int
    total: int | None = None


class MountStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One mount. `mode` is the way it is served, `why` says why it is no better one; the byte
    counts are of raw space. `problem` is what holds the background download up at the moment, in
    one line, or empty.
    """

    target: str
    reference: str
    digest: str
    state: str
    mode: str
    local_bytes: int
    total_bytes: int
    problem: str = ""
    why: str = ""


class PodmanImage(msgspec.Struct, frozen=True, kw_only=True):
    """One image in podman's image store. `digest` is its manifest's in the registry, `state` as of
    a mount, or UNSERVED: then `problem` says why. Bytes are of raw space."""

    id: str
    names: list[str]
    digest: str
    state: str
    mode: str
    why: str
    local_bytes: int
    total_bytes: int
    problem: str = ""


class PodmanAdded(msgspec.Struct, frozen=True, tag="podman added"):
    """The reply to PodmanAddRequest."""

    image: PodmanImage


class CredentialsTaken(msgspec.Struct, frozen=True, tag="credentials taken"):
    """The reply to PodmanCredentialsRequest."""


class Mounted(msgspec.Struct, frozen=True, tag="mounted"):
    """The reply to MountRequest."""

    mount: MountStatus


class Unmounted(msgspec.Struct, frozen=True, tag="unmounted"):
    """The reply to UmountRequest and StopRequest. `ending`: the daemon ends now, by itself."""

    ending: bool


class Fetched(msgspec.Struct, frozen=True):
    """What one class of fetching has cost since the daemon's start; bytes as on the network."""

    requests: int
    bytes: int


class ImageStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One image that containerd has lazily. `state` as of a mount; bytes are of raw space.

    `snapshots` counts those of its layers that containerd has.
    """

    reference: str
    digest: str
    state: str
    layers: int
    snapshots: int
    mode: str
    why: str
    local_bytes: int
    total_bytes: int
    problem: str = ""


class Fallback(msgspec.Struct, frozen=True, kw_only=True):
    """An image that containerd had to pull as without us, why (`kind` is a word for counters), how
    often, and when last (nanoseconds since the epoch)."""

    reference: str
    image: str
    kind: str
    reason: str
    count: int
    at_ns: int


class Calls(msgspec.Struct, frozen=True, kw_only=True):
    """How often containerd's call `method` ended with gRPC status `code`, and took in sum."""

    method: str
    code: str
    count: int
    seconds: float


class ContainerdStatus(msgspec.Struct, frozen=True, kw_only=True):
    """The snapshotter. Layers and snapshots of containers and views are those that there are now;
    `without_labels` counts layers since the start of the daemon for which no labels came.
    `idmapped` says why lower directories cannot be ID-mapped, and is empty if they can."""

    address: str
    lazy_layers: int
    ordinary_layers: int
    containers: int
    views: int
    without_labels: int
    idmapped: str
    images: list[ImageStatus]
    fallbacks: list[Fallback]
    calls: list[Calls]


class StoreStatus(msgspec.Struct, frozen=True, kw_only=True):
    """The store, in bytes of disk: what it takes, the most it may take now, what is free on its
    disk, and what was evicted since the daemon's start. `problem` is what is wrong with it, in one
    line, or empty."""

    used: int
    limit: int
    free: int
    evicted: int
    problem: str = ""


class Status(msgspec.Struct, frozen=True, tag="status"):
    """The reply to StatusRequest. `fetched` goes by class: blocked, readahead, startup, fill.

    `retries` counts requests that were made again, `damaged` what came damaged from a registry,
    `fuse_requests` what the kernel has asked of this process.
    `containerd` is None if this daemon does not serve it, `store` if no daemon runs. `podman` lists
    what is in its image store.
    """

    pid: int
    root: str
    state: str
    mounts: list[MountStatus]
    fetched: dict[str, Fetched] = {}
    retries: int = 0
    damaged: int = 0
    fuse_requests: int = 0
    containerd: ContainerdStatus | None = None
    podman: list[PodmanImage] = []
    store: StoreStatus | None = None


class Garbage(msgspec.Struct, frozen=True, kw_only=True):
    """Something that goes. `kind` is layer, index, image or file; `name` a content key or digest in
    hexadecimal, an image's digest, or a path; `bytes` are of disk, `used_ns` is when it was last
    used (nanoseconds since the epoch), 0 where that is not known."""

    kind: str
    name: str
    why: str
    bytes: int
    reference: str = ""
    used_ns: int = 0


class Collected(msgspec.Struct, frozen=True, tag="collected"):
    """The reply to CollectRequest. `freed` are bytes of disk."""

    garbage: list[Garbage]
    freed: int


class LayerUsage(msgspec.Struct, frozen=True, kw_only=True):
    """A layer in the store, named by its content `key`. `digests` are what images call it.

    `size` is raw space, `local` how much of that is here, `disk` what it takes. `images` counts
    those that have it.
    """

    key: str
    digests: list[str]
    size: int
    local: int
    disk: int
    used_ns: int
    images: int
    in_use: bool


class ImageUsage(msgspec.Struct, frozen=True, kw_only=True):
    """An image in the store. Of the bytes of disk that it takes, others have `shared`, too, and no
    other has `exclusive`. `layers` are keys, lowest first; `users` say who uses it."""

    reference: str
    digest: str
    size: int
    local: int
    shared: int
    exclusive: int
    used_ns: int
    users: list[str]
    layers: list[str]


class DiskUsage(msgspec.Struct, frozen=True, kw_only=True, tag="disk usage"):
    """The reply to DiskUsageRequest. `unnamed` are bytes of disk that no image has."""

    images: list[ImageUsage]
    layers: list[LayerUsage]
    used: int
    unnamed: int
    limit: int
    free: int


class TracedStep(msgspec.Struct, frozen=True, array_like=True):
    """A step of opening an image. Times are seconds since the beginning of the record."""

    name: str
    at: float
    seconds: float


class TracedStall(msgspec.Struct, frozen=True, array_like=True):
    """A read that waited: of `length` bytes at `offset` of a layer's raw space. `layer` is its
    number in the file index."""

    layer: int
    offset: int
    length: int
    at: float
    seconds: float


class TracedExchange(msgspec.Struct, frozen=True, array_like=True):
    """A request of a class (`kind`), `bytes` as on the network. `answered` and `ended` are
    negative if it had not been, or had not ended."""

    layer: int
    kind: str
    at: float
    answered: float
    ended: float
    bytes: int


class TracedChunk(msgspec.Struct, frozen=True, array_like=True):
    """A chunk that was fetched for a class, or on the way to others (`cause` empty), with its
    length. `read` tells whether it was read."""

    layer: int
    chunk: int
    length: int
    cause: str
    read: bool


class StartRecord(msgspec.Struct, frozen=True, kw_only=True, tag="start record"):
    """The reply to WhyRequest: what was recorded since `began_ns` (of the epoch), `seconds` ago.

    `window` is for how many seconds it is recorded. `index` is the digest of the image's file index
    in hexadecimal. `first_reads` counts the chunks that were read.
    """

    reference: str
    digest: str
    index: str
    layers: list[str]
    began_ns: int
    seconds: float
    window: float
    steps: list[TracedStep]
    stalls: list[TracedStall]
    exchanges: list[TracedExchange]
    chunks: list[TracedChunk]
    first_reads: int


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """The reply to any request that could not be done: what is wrong, and what to do about it."""

    message: str
    hint: str = ""


Request = (
    MountRequest
    | UmountRequest
    | PodmanAddRequest
    | PodmanRemoveRequest
    | PodmanCredentialsRequest
    | StatusRequest
    | StopRequest
    | HandOverRequest
    | CollectRequest
    | DiskUsageRequest
    | WhyRequest
)
Reply = (
    Mounted
    | Unmounted
    | PodmanAdded
    | CredentialsTaken
    | Status
    | Collected
    | DiskUsage
    | StartRecord
    | Failed
)
FromDaemon = Hello | Progress | Reply

_encoder = msgspec.json.Encoder()


def encode(message: Request | FromDaemon) -> bytes:
    """A message as it travels."""
    return _encoder.encode(message) + b"\n"


class MessageReader(Generic[_T]):
    """Cuts a byte stream into messages. `feed` raises ControlProtocolError on anything else."""

    def __init__(self, decoder: msgspec.json.Decoder[_T]) -> None:
        self._decoder = decoder
        self._rest = bytearray()

    def feed(self, data: bytes) -> list[_T]:
        """The messages that `data` completes, in order."""
        self._rest += data
        *lines, rest = self._rest.split(b"\n")
        if len(rest) > MAX_MESSAGE:
            raise ControlProtocolError(
                f"a message on the control socket exceeds {MAX_MESSAGE} bytes"
            )
        self._rest = rest
        return [self._decode(line) for line in lines]

    def _decode(self, line: bytearray) -> _T:
        try:
            return self._decoder.decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ControlProtocolError(
                f"a message on the control socket makes no sense ({error})",
                hint="command and daemon may be of different versions: restart the daemon",
            ) from error


def request_reader() -> MessageReader[Request]:
    """Reads what clients send."""
    return MessageReader(msgspec.json.Decoder(Request))


def answer_reader() -> MessageReader[FromDaemon]:
    """Reads what the daemon sends."""
    return MessageReader(msgspec.json.Decoder(FromDaemon))
