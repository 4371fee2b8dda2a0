"""Manifests: what is read, what is refused, and that new ones have stable bytes."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from index.errors import FirstByteError, UnsupportedError
from snapshotter.registry.errors import ProtocolError
from snapshotter.registry.manifest import (
    DOCKER_CONFIG,
    DOCKER_LAYER,
    DOCKER_MANIFEST,
    DOCKER_PLATFORM_LIST,
    MAX_MANIFEST,
    OCI_CONFIG,
    OCI_LAYER,
    OCI_MANIFEST,
    OCI_PLATFORM_LIST,
    Descriptor,
    Manifest,
    PlatformList,
    check_image,
    parse,
    parse_config,
)
from tests.support.images import digest

JSON = dict[str, object]


def descriptor(media_type: str) -> JSON:
    return {"mediaType": media_type, "digest": digest(media_type.encode()), "size": 7}


def manifest(**changes: object) -> JSON:
    document: JSON = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": descriptor(OCI_CONFIG),
        "layers": [descriptor(f"{OCI_LAYER}+gzip"), descriptor(f"{OCI_LAYER}+zstd")],
    }
    return {key: value for key, value in (document | changes).items() if value is not None}


def read(document: object, media_type: str = OCI_MANIFEST) -> Manifest | PlatformList:
    return parse(json.dumps(document).encode(), media_type, "the image")


def test_docker_and_oci_are_read_alike() -> None:
    """Schema 2 and OCI manifests differ in media types only."""
    docker = manifest(
        mediaType=DOCKER_MANIFEST,
        config=descriptor(DOCKER_CONFIG),
        layers=[descriptor(f"{DOCKER_LAYER}.gzip")],
    )
    for found in (read(docker, DOCKER_MANIFEST), read(manifest())):
        assert isinstance(found, Manifest)
        check_image(found, "the image")
        assert parse(found.raw, found.media_type, "again") == found
        assert found.descriptor.digest == digest(found.raw)


def test_platform_lists() -> None:
    """Both kinds of list are read, nulls and unknown fields included."""
    entry = descriptor(OCI_MANIFEST) | {"platform": {"architecture": "arm", "os.version": "1"}}
    for kind in (OCI_PLATFORM_LIST, DOCKER_PLATFORM_LIST):
        document = {
            "schemaVersion": 2,
            "mediaType": kind,
            "manifests": [entry],
            "annotations": None,
        }
        found = read(document, kind)
        assert isinstance(found, PlatformList)
        assert found.manifests[0].platform is not None
        assert found.manifests[0].platform.architecture == "arm"


@pytest.mark.parametrize(
    ("document", "media_type"),
    [
        (manifest(mediaType=OCI_PLATFORM_LIST), OCI_MANIFEST),
        (manifest(), OCI_PLATFORM_LIST),
        (manifest(), DOCKER_MANIFEST),
        (manifest(manifests=[]), OCI_MANIFEST),
        (manifest(config=None), OCI_MANIFEST),
        (manifest(layers=None), OCI_MANIFEST),
        (manifest(layers=[{"mediaType": "x"}]), OCI_MANIFEST),
        (manifest(config=descriptor("x") | {"size": -1}), OCI_MANIFEST),
        (manifest(config=descriptor("x") | {"digest": "sha256:../../etc/passwd"}), OCI_MANIFEST),
        ({"schemaVersion": 2, "manifests": [], "layers": []}, OCI_PLATFORM_LIST),
        ({}, OCI_MANIFEST),
        ([], OCI_MANIFEST),
    ],
)
def test_what_makes_no_sense(document: object, media_type: str) -> None:
    """Documents that contradict themselves or their media type are ProtocolErrors, in one line."""
    with pytest.raises(ProtocolError, match=r"^the image") as caught:
        read(document, media_type)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("document", "media_type"),
    [
        (manifest(mediaType="application/vnd.oci.artifact.manifest.v1+json"), ""),
        (manifest(mediaType=None), "text/html"),
        (manifest(schemaVersion=3), OCI_MANIFEST),
        ({"schemaVersion": 1}, "application/json"),
        (manifest(config=descriptor("x") | {"digest": "sha512:" + "0" * 128}), OCI_MANIFEST),
    ],
)
def test_what_is_not_supported(document: object, media_type: str) -> None:
    """Other kinds of manifests and digests are refused by name."""
    with pytest.raises(UnsupportedError):
        read(document, media_type)


@pytest.mark.parametrize(
    "changes",
    [
        {"config": descriptor("application/vnd.cncf.helm.config.v1+json")},
        {"layers": [descriptor("application/vnd.oci.image.layer.v1.tar+gzip+encrypted")]},
        {"layers": [descriptor("application/vnd.oci.image.layer.nydus.blob.v1")]},
    ],
)
def test_what_is_not_a_container_image(changes: JSON) -> None:
    """An artifact, or an image of layers that are no tars, is named for what it is."""
    found = read(manifest(**changes))
    assert isinstance(found, Manifest)
    with pytest.raises(UnsupportedError, match="vnd"):
        check_image(found, "the image")


def test_too_large() -> None:
    """Size is checked before anything is parsed."""
    with pytest.raises(ProtocolError, match="larger than 4 MiB"):
        parse(b"{" * (MAX_MANIFEST + 1), OCI_MANIFEST, "the image")


def test_new_manifests_are_deterministic() -> None:
    """The same content gives the same bytes, in whatever order annotations were made."""

    def build(names: str) -> Manifest:
        layer = Descriptor(media_type="a/b", digest=digest(b""), size=0)
        return Manifest.build(
            config=layer, layers=[layer], subject=layer, annotations=dict.fromkeys(names, "v")
        )

    assert build("abc").raw == build("cba").raw
    assert json.loads(build("ab").raw)["annotations"] == {"a": "v", "b": "v"}


def test_config() -> None:
    """Null and missing fields of a configuration are the same; diffIDs must be digests."""
    document = {
        "architecture": "arm64",
        "os": "linux",
        "variant": "v8",
        "config": {"Entrypoint": ["/init"], "Cmd": None, "WorkingDir": "/w", "Healthcheck": {}},
        "rootfs": {"type": "layers", "diff_ids": [digest(b"")]},
    }
    config = parse_config(json.dumps(document).encode(), "it")
    assert config.run.entrypoint == ["/init"]
    assert (config.run.cmd, config.run.env, config.run.user) == (None, None, None)
    assert str(config.platform) == "linux/arm64"
    without = document | {"config": None}
    assert parse_config(json.dumps(without).encode(), "it").run.entrypoint is None
    broken = document | {"rootfs": {"diff_ids": ["nonsense"]}}
    with pytest.raises(ProtocolError, match=r"^it has a malformed digest"):
        parse_config(json.dumps(broken).encode(), "it")


anything = st.recursive(
    st.none() | st.integers() | st.text(max_size=20) | st.sampled_from([OCI_MANIFEST, digest(b"")]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from([*manifest(), "manifests", "digest", "size", "subject", "annotations"]),
            inner,
            max_size=6,
        )
    ),
    max_leaves=20,
)


@given(
    anything
    | st.builds(
        lambda changes: manifest(**changes),
        st.dictionaries(
            st.sampled_from([*manifest(), "manifests", "subject", "annotations"]),
            anything,
            max_size=2,
        ),
    ),
    st.sampled_from([OCI_MANIFEST, OCI_PLATFORM_LIST, DOCKER_MANIFEST, "", "text/plain", "a/b"]),
)
def test_any_document(document: object, media_type: str) -> None:
    """Any JSON is a manifest, a list, or a FirstByteError."""
    said = ""
    try:
        found = read(document, media_type)
    except FirstByteError as error:
        said = str(error)
    else:
        assert parse(found.raw, found.media_type, "again") == found
    assert "\n" not in said


@given(st.binary(max_size=200))
def test_any_bytes(raw: bytes) -> None:
    """Bytes that are no JSON are a FirstByteError."""
    with pytest.raises(FirstByteError):
        parse(raw, OCI_MANIFEST, "it")
    with pytest.raises(FirstByteError):
        parse_config(raw, "it")


def test_deep_nesting() -> None:
    """JSON that is nested beyond reason is refused like other nonsense."""
    with pytest.raises(FirstByteError):
        parse(b'{"annotations":' + b"[" * 1_000_000, OCI_MANIFEST, "it")
