"""Choosing a platform, as containerd does."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapshotter.registry.errors import InvalidReferenceError, NotFoundError
from snapshotter.registry.manifest import OCI_MANIFEST, Descriptor, PlatformFields
from snapshotter.registry.platform import Platform, select


def entry(platform: str | None, artifact_type: str = "") -> Descriptor:
    os, architecture, variant = (*(platform or "").split("/"), "", "")[:3]
    return Descriptor(
        media_type=OCI_MANIFEST,
        digest="sha256:" + f"{abs(hash(platform)):064x}",
        size=1,
        artifact_type=artifact_type,
        platform=PlatformFields(architecture=architecture, os=os, variant=variant)
        if platform
        else None,
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("linux/amd64", "linux/amd64"),
        ("linux/x86_64", "linux/amd64"),
        ("Linux/X86-64/v1", "linux/amd64"),
        ("linux/amd64/v3", "linux/amd64/v3"),
        ("linux/aarch64", "linux/arm64"),
        ("linux/arm64/v8", "linux/arm64"),
        ("linux/arm64/8", "linux/arm64"),
        ("linux/arm", "linux/arm/v7"),
        ("linux/armhf", "linux/arm/v7"),
        ("linux/armel", "linux/arm/v6"),
        ("linux/armv7l", "linux/arm/v7"),
        ("linux/arm/6", "linux/arm/v6"),
        ("linux/i686", "linux/386"),
        ("macos/arm64", "darwin/arm64"),
    ],
)
def test_normalisation(text: str, expected: str) -> None:
    """Each platform has one name, whatever the machine or the person calls it."""
    assert str(Platform.parse(text)) == expected


def test_half_a_platform() -> None:
    """An os or an architecture alone takes the rest from this machine."""
    host = Platform.host()
    assert Platform.parse(host.os) == host
    assert Platform.parse("riscv64") == Platform(host.os, "riscv64")


@pytest.mark.parametrize("text", ["", "/", "linux/", "a/b/c/d", "linux/a b", "linux//v7"])
def test_malformed(text: str) -> None:
    """What is no platform is refused."""
    with pytest.raises(InvalidReferenceError):
        Platform.parse(text)


@pytest.mark.parametrize(
    ("wanted", "offered", "chosen"),
    [
        ("linux/amd64", ["linux/arm64", "linux/amd64"], "linux/amd64"),
        ("linux/amd64", ["linux/amd64/v2", "linux/amd64/v1"], "linux/amd64/v1"),
        ("linux/amd64/v3", ["linux/amd64", "linux/amd64/v2", "linux/amd64/v4"], "linux/amd64/v2"),
        ("linux/amd64/v4", ["linux/386", "linux/amd64"], "linux/amd64"),
        ("linux/amd64", ["linux/386"], "linux/386"),
        ("linux/arm", ["linux/arm/v5", "linux/arm/v6", "linux/arm/v8"], "linux/arm/v6"),
        ("linux/arm64", ["linux/arm/v7", "linux/arm64/v8"], "linux/arm64/v8"),
        ("linux/arm64", ["linux/arm/v6", "linux/arm/v7"], "linux/arm/v7"),
        ("linux/s390x", ["windows/s390x", "linux/s390x"], "linux/s390x"),
    ],
)
def test_best_fit(wanted: str, offered: list[str], chosen: str) -> None:
    """The nearest that runs is taken, wherever in the list it is."""
    for order in (offered, offered[::-1]):
        entries = [entry(platform) for platform in order]
        assert select(entries, Platform.parse(wanted), "x") == entry(chosen)


@pytest.mark.parametrize(
    ("wanted", "offered"),
    [
        ("linux/amd64", ["linux/amd64/v2"]),
        ("linux/386", ["linux/amd64"]),
        ("linux/arm/v6", ["linux/arm/v7"]),
        ("linux/amd64", ["windows/amd64"]),
    ],
)
def test_nothing_fits(wanted: str, offered: list[str]) -> None:
    """What would not run is not taken, and the error lists what there is."""
    with pytest.raises(NotFoundError, match=offered[0]):
        select([entry(platform) for platform in offered], Platform.parse(wanted), "x")


def test_attestations_and_artifacts_are_no_images() -> None:
    """Entries beside the images never stand in for one, nor are they listed as available."""
    others = [entry("unknown/unknown"), entry("linux/amd64", "application/sbom")]
    with pytest.raises(NotFoundError, match="available: none"):
        select(others, Platform("linux", "amd64"), "x")


def test_entry_without_platform() -> None:
    """An entry that does not say its platform is the last resort."""
    unstated = entry(None)
    wanted = Platform("linux", "amd64")
    assert select([unstated], wanted, "x") is unstated
    assert select([unstated, entry("linux/amd64")], wanted, "x") == entry("linux/amd64")


words = st.sampled_from(
    [
        "linux",
        "windows",
        "amd64",
        "x86_64",
        "arm",
        "armhf",
        "arm64",
        "386",
        "v1",
        "v8",
        "8",
        "7",
        "",
    ]
)


@given(words, words, words)
def test_normalising_again_changes_nothing(os: str, architecture: str, variant: str) -> None:
    """Normalised is normalised."""
    once = Platform.normalised(os, architecture, variant)
    assert Platform.normalised(once.os, once.architecture, once.variant) == once


@given(st.lists(st.builds("{}/{}/{}".format, words, words, words), max_size=6), words)
def test_selection_is_an_entry_or_an_error(offered: list[str], architecture: str) -> None:
    """Selection never invents: it gives an acceptable entry of the list, or NotFoundError."""
    wanted = Platform.normalised("linux", architecture)
    entries = [entry(platform) for platform in offered]
    acceptable = wanted.acceptable()
    fits = [
        found
        for found in entries
        if (p := found.platform)
        and Platform.normalised(p.os, p.architecture, p.variant) in acceptable
    ]
    if fits:
        assert select(entries, wanted, "x") in fits
    else:
        with pytest.raises(NotFoundError):
            select(entries, wanted, "x")
