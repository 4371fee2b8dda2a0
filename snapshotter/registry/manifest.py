"""Manifests, platform lists and image configurations: typed, checked, with the bytes kept.

Sources: OCI image spec 1.1 (descriptor.md, manifest.md, image-index.md, config.md), Docker image
manifest version 2 schema 2. The bytes are kept because a digest is over them, not over meaning.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

import msgspec

from index.errors import UnsupportedError
from snapshotter.registry.digests import check_digest, digest_of
from snapshotter.registry.errors import ProtocolError
from snapshotter.registry.platform import Platform

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

MAX_MANIFEST = 4 << 20
"""Bytes of the largest manifest, platform list or configuration; the distribution spec's limit."""

OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_PLATFORM_LIST = "application/vnd.oci.image.index.v1+json"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
OCI_EMPTY = "application/vnd.oci.empty.v1+json"
OCI_LAYER = "application/vnd.oci.image.layer.v1.tar"
OCI_NONDISTRIBUTABLE_LAYER = "application/vnd.oci.image.layer.nondistributable.v1.tar"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_PLATFORM_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_CONFIG = "application/vnd.docker.container.image.v1+json"
DOCKER_LAYER = "application/vnd.docker.image.rootfs.diff.tar"
DOCKER_FOREIGN_LAYER = "application/vnd.docker.image.rootfs.foreign.diff.tar"

MANIFEST_TYPES = (OCI_MANIFEST, DOCKER_MANIFEST)
PLATFORM_LIST_TYPES = (OCI_PLATFORM_LIST, DOCKER_PLATFORM_LIST)
ACCEPT = ", ".join((*MANIFEST_TYPES, *PLATFORM_LIST_TYPES))
"""What a request for a manifest says it understands."""

LAYER_TYPES = frozenset(
    base + compression
    for base in (OCI_LAYER, OCI_NONDISTRIBUTABLE_LAYER, DOCKER_LAYER, DOCKER_FOREIGN_LAYER)
    for compression in ("", "+gzip", ".gzip", "+zstd", ".zstd", "+lz4")
)
"""Layer media types that are tars; `+lz4` is FirstByte's own. The bytes tell the codec."""

EMPTY_JSON = b"{}"
"""The content of the empty descriptor, the configuration of artifacts that have none."""

_SCHEMA1 = "application/vnd.docker.distribution.manifest.v1+"
_UNTYPED = frozenset(
    {"", "application/json", "application/octet-stream", "text/plain", "binary/octet-stream"}
)  # what file servers and object stores say

_T = TypeVar("_T")
_encoder = msgspec.json.Encoder(order="deterministic")


class PlatformFields(msgspec.Struct, frozen=True, omit_defaults=True):
    """A descriptor's platform, as it is written; `Platform.normalised` makes it comparable."""

    architecture: str = ""
    os: str = ""
    variant: str = ""


class Descriptor(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, rename="camel"):
    """What names a blob or manifest: media type, digest, and size in bytes."""

    media_type: str
    digest: str
    size: int
    artifact_type: str = ""
    annotations: dict[str, str] | None = None
    platform: PlatformFields | None = None

    def __post_init__(self) -> None:
        check_digest(self.digest)
        if self.size < 0:
            raise ProtocolError(f"descriptor of {self.digest} with the size {self.size}")

    def annotation(self, key: str) -> str | None:
        """The value of one annotation."""
        return (self.annotations or {}).get(key)


EMPTY_DESCRIPTOR = Descriptor(
    media_type=OCI_EMPTY, digest=digest_of(EMPTY_JSON), size=len(EMPTY_JSON)
)


class _Document(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, rename="camel"):
    """Manifest and platform list alike: telling them apart is part of checking them."""

    schema_version: int
    media_type: str | None = None
    artifact_type: str | None = None
    config: Descriptor | None = None
    layers: list[Descriptor] | None = None
    manifests: list[Descriptor] | None = None
    subject: Descriptor | None = None
    annotations: dict[str, str] | None = None


@dataclass(frozen=True, slots=True)
class Manifest:
    """An image's or artifact's manifest: its configuration and layers, lowest first."""

    raw: bytes
    media_type: str
    config: Descriptor
    layers: tuple[Descriptor, ...]
    subject: Descriptor | None = None
    artifact_type: str = ""
    annotations: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def build(
        cls,
        *,
        config: Descriptor,
        layers: Sequence[Descriptor],
        subject: Descriptor | None = None,
        artifact_type: str = "",
        annotations: Mapping[str, str] | None = None,
    ) -> Manifest:
        """A new OCI manifest. The same arguments give the same bytes."""
        document = _Document(
            schema_version=2,
            media_type=OCI_MANIFEST,
            artifact_type=artifact_type or None,
            config=config,
            layers=list(layers),
            subject=subject,
            annotations=dict(annotations) if annotations else None,
        )
        manifest = parse(_encoder.encode(document), OCI_MANIFEST, "the new manifest")
        assert isinstance(manifest, cls)
        return manifest

    @property
    def descriptor(self) -> Descriptor:
        """What names this manifest. An artifact's type and annotations come along."""
        return Descriptor(
            media_type=self.media_type,
            digest=digest_of(self.raw),
            size=len(self.raw),
            artifact_type=self.artifact_type or (self.config.media_type if self.subject else ""),
            annotations=dict(self.annotations) if self.subject and self.annotations else None,
        )


@dataclass(frozen=True, slots=True)
class PlatformList:
    """One name's manifests for several platforms (the OCI "image index")."""

    raw: bytes
    media_type: str
    manifests: tuple[Descriptor, ...]
    annotations: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def build(cls, manifests: Sequence[Descriptor]) -> PlatformList:
        """A new OCI platform list; also the form of a list of referrers."""
        document = _Document(
            schema_version=2, media_type=OCI_PLATFORM_LIST, manifests=list(manifests)
        )
        platform_list = parse(_encoder.encode(document), OCI_PLATFORM_LIST, "the new list")
        assert isinstance(platform_list, cls)
        return platform_list

    @property
    def descriptor(self) -> Descriptor:
        """What names this list."""
        return Descriptor(
            media_type=self.media_type, digest=digest_of(self.raw), size=len(self.raw)
        )


class RunConfig(msgspec.Struct, frozen=True, rename="pascal"):
    """What to run, of an image's configuration. Tools write null for what is not set."""

    entrypoint: list[str] | None = None
    cmd: list[str] | None = None
    env: list[str] | None = None
    working_dir: str | None = None
    user: str | None = None


class RootFS(msgspec.Struct, frozen=True):
    """The digests of the layers' uncompressed tars, lowest first."""

    diff_ids: list[str]

    def __post_init__(self) -> None:
        for diff_id in self.diff_ids:
            check_digest(diff_id)


class ImageConfig(msgspec.Struct, frozen=True):
    """An image's configuration, as far as FirstByte uses it."""

    architecture: str
    os: str
    rootfs: RootFS
    variant: str = ""
    config: RunConfig | None = None

    @property
    def platform(self) -> Platform:
        """The platform the image says it is for."""
        return Platform.normalised(self.os, self.architecture, self.variant)

    @property
    def run(self) -> RunConfig:
        """What to run; nothing set if the image does not say."""
        return self.config or RunConfig()


def parse(raw: bytes, media_type: str, what: str) -> Manifest | PlatformList:
    """Read a manifest or platform list; `what` names it in errors.

    `media_type` is what came with it: a Content-Type header or a descriptor's media type. Raises
    ProtocolError if it is malformed, too large, or not what it says; UnsupportedError for other
    kinds.
    """
    declared = media_type.partition(";")[0].strip().lower()
    if declared.startswith(_SCHEMA1):
        raise _schema1(what)
    document = _decode(raw, _Document, what)
    if document.schema_version == 1:
        raise _schema1(what)
    if document.schema_version != 2:
        raise UnsupportedError(f"{what} has schema version {document.schema_version}, not 2")
    actual = _media_type(declared, document, what)
    if actual in PLATFORM_LIST_TYPES:
        if document.manifests is None or document.layers is not None or document.config:
            raise ProtocolError(f"{what} is not the platform list it says it is")
        return PlatformList(raw, actual, tuple(document.manifests), document.annotations or {})
    if document.config is None or document.layers is None or document.manifests is not None:
        raise ProtocolError(f"{what} is not the manifest it says it is")
    return Manifest(
        raw=raw,
        media_type=actual,
        config=document.config,
        layers=tuple(document.layers),
        subject=document.subject,
        artifact_type=document.artifact_type or "",
        annotations=document.annotations or {},
    )


def parse_config(raw: bytes, what: str) -> ImageConfig:
    """Read an image's configuration; raises as `parse` does."""
    return _decode(raw, ImageConfig, what)


def check_image(manifest: Manifest, what: str) -> None:
    """Raise UnsupportedError unless `manifest` is a container image of layers that are tars."""
    if manifest.config.media_type not in (OCI_CONFIG, DOCKER_CONFIG):
        kind = manifest.artifact_type or manifest.config.media_type
        raise UnsupportedError(f"{what} is not a container image but {kind}")
    for number, layer in enumerate(manifest.layers, 1):
        if layer.media_type not in LAYER_TYPES:
            raise UnsupportedError(f"layer {number} of {what} has media type {layer.media_type}")


def _decode(raw: bytes, kind: type[_T], what: str) -> _T:
    if len(raw) > MAX_MANIFEST:
        raise too_large(what)
    try:
        return msgspec.json.decode(raw, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"{what} is malformed ({error})") from error
    except (ProtocolError, UnsupportedError) as error:  # from a value's own checks
        raise type(error)(f"{what} has a {error.message}", hint=error.hint) from error


def too_large(what: str) -> ProtocolError:
    """The error for a document over MAX_MANIFEST."""
    return ProtocolError(f"{what} is larger than {MAX_MANIFEST >> 20} MiB")


def _schema1(what: str) -> UnsupportedError:
    return UnsupportedError(
        f"{what} is a manifest of Docker's schema 1", hint="push it again with a current tool"
    )


def _media_type(declared: str, document: _Document, what: str) -> str:
    """The document's kind. Both places that state it must agree (CVE-2021-41190)."""
    inside = (document.media_type or "").lower()
    if inside and declared not in _UNTYPED and declared != inside:
        raise ProtocolError(f"{what} came as {declared} but says it is {inside}")
    stated = inside or declared
    if stated in _UNTYPED:
        return OCI_MANIFEST if document.manifests is None else OCI_PLATFORM_LIST
    if stated not in MANIFEST_TYPES + PLATFORM_LIST_TYPES:
        raise UnsupportedError(f"{what} has media type {stated[:100]}")
    return stated
