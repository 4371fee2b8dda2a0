"""What `firstbyte doctor podman` says of what it finds on a node."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from snapshotter.doctor.podman import Facts, Helper, Namespace, examine
from snapshotter.podman.storage_conf import StorageConf, StorageConfError, read_storage_conf

if TYPE_CHECKING:
    from snapshotter.doctor.findings import Finding

IMAGES = Path("/var/lib/firstbyte/podman/images")
LAYERS = Path("/var/lib/firstbyte/podman/layers")
CONF = Path("/etc/containers/storage.conf")
HELPER = "/usr/local/bin/firstbyte-podman-credentials"


def look(
    podman: tuple[int, int] | None = (4, 3),
    conf: StorageConf | str | None = None,
    present: tuple[str, ...] = (str(IMAGES), str(LAYERS)),
    unserved: list[tuple[str, str]] | str | None = None,
    helper: Helper | str | None = None,
    namespace: Namespace | str | None = None,
) -> dict[str, Finding]:
    facts = Facts(
        podman=podman,
        conf=conf or StorageConf(CONF, "overlay", image_stores=(str(IMAGES),)),
        present=present,
        fuse=True,
        overlay_failure=None,
        overlay_tried=True,
        unserved=[] if unserved is None else unserved,
        helper=Helper("", runs=False, ours=HELPER) if helper is None else helper,
        namespace=namespace,
    )
    return {finding.check: finding for finding in examine(facts, IMAGES, LAYERS)}


def with_layers(*entries: str) -> StorageConf:
    return StorageConf(CONF, "overlay", image_stores=(str(IMAGES),), layer_stores=entries)


def test_all_is_well() -> None:
    assert {finding.state.value for finding in look().values()} == {"ok"}


@pytest.mark.parametrize(
    ("version", "doors"),
    [
        ((3, 2), "the image store alone: it knows no layer stores"),
        ((4, 3), "the image store, and the layer store for any image"),
        ((5, 2), "the layer store for images with tables of contents"),
        ((5, 4), "the image store alone: it forgets"),
    ],
)
def test_the_version_says_which_doors_are_open(version: tuple[int, int], doors: str) -> None:
    assert doors in look(podman=version)["podman"].found


def test_without_podman() -> None:
    assert look(podman=None)["podman"].state.value == "problem"


def test_a_store_that_is_missing_stops_podman() -> None:
    found = look(present=())["stores"]
    assert found.state.value == "problem"
    assert "no podman command works" in found.found
    assert "start the daemon" in found.mend


def test_a_missing_store_of_somebody_else_has_to_be_made() -> None:
    conf = StorageConf(CONF, "overlay", image_stores=("/other", str(IMAGES)))
    assert "mkdir -p /other" in look(conf=conf)["stores"].mend


def test_an_image_store_that_is_not_named_keeps_the_others() -> None:
    found = look(conf=StorageConf(CONF, "overlay", image_stores=("/other",)), present=("/other",))
    assert f'additionalimagestores = ["/other", "{IMAGES}"]' in found["image-store"].mend


def test_the_layer_store_needs_its_option() -> None:
    found = look(conf=with_layers(str(LAYERS)))["layer-store"]
    assert found.state.value == "problem"
    assert f'"{LAYERS}:ref"' in found.mend


def test_the_layer_store_is_of_no_use_to_a_podman_that_forgets() -> None:
    assert look(conf=with_layers(f"{LAYERS}:ref"))["layer-store"].state.value == "ok"
    new = look(podman=(5, 8), conf=with_layers(f"{LAYERS}:ref"))["layer-store"]
    assert new.state.value == "warning"


def test_credentials_are_handed_over_by_a_program_that_registries_conf_names() -> None:
    used = with_layers(f"{LAYERS}:ref")
    unnamed = look(podman=(5, 2), conf=used)["credentials"]
    assert unnamed.state.value == "warning"
    assert f'additional-layer-store-auth-helper = "{HELPER}"' in unnamed.mend
    named = look(podman=(5, 2), conf=used, helper=Helper(HELPER, runs=True, ours=HELPER))
    assert named["credentials"].found == f"podman hands them to {HELPER}"


@pytest.mark.parametrize("version", [(4, 3), (5, 1), (5, 4)])
def test_other_podmans_have_nobody_to_hand_credentials_to(version: tuple[int, int]) -> None:
    found = look(podman=version, conf=with_layers(f"{LAYERS}:ref"))["credentials"]
    assert found.state.value == "ok"


def test_a_program_for_credentials_that_is_not_there() -> None:
    gone = Helper("/opt/gone", runs=False, ours=HELPER)
    found = look(podman=(5, 8), helper=gone)["credentials"]
    assert found.state.value == "problem"
    assert "/opt/gone" in found.found
    assert look(helper="it is malformed")["credentials"].found == "it is malformed"


def test_no_storage_conf_and_another_driver_are_problems() -> None:
    assert look(conf=StorageConf(None))["storage.conf"].state.value == "problem"
    assert look(conf=StorageConf(CONF, "vfs"))["storage.conf"].state.value == "problem"
    unreadable = look(conf="it is malformed")
    assert unreadable["storage.conf"].found == "it is malformed"
    assert unreadable["image-store"].state.value == "skipped"


def test_images_that_cannot_be_run() -> None:
    assert look(unserved="no daemon runs")["images"].state.value == "problem"
    found = look(unserved=[("registry.example/app:1", "it is gone")])["images"]
    assert found.mend == "try: firstbyte podman add registry.example/app:1"


@pytest.mark.parametrize(
    ("namespace", "state", "words"),
    [
        (Namespace(65_537, opens_fuse=True, shared=True), "ok", "65537 user IDs"),
        (Namespace(65_537, opens_fuse=True, shared=None), "ok", "mode fuse"),
        (Namespace(65_537, opens_fuse=True, shared=False), "problem", "a new namespace"),
        (Namespace(65_537, opens_fuse=False, shared=True), "problem", "/dev/fuse"),
        (Namespace(1, opens_fuse=True, shared=True), "warning", "one user ID"),
        ("there is no podman", "problem", "there is no podman"),
    ],
)
def test_what_podman_without_root_works_in(
    namespace: Namespace | str, state: str, words: str
) -> None:
    found = look(namespace=namespace)["rootless"]
    assert found.state.value == state
    assert words in found.found


def test_without_root_the_driver_has_to_be_named() -> None:
    unnamed = StorageConf(CONF, image_stores=(str(IMAGES),))
    assert look(conf=unnamed)["storage.conf"].state.value == "ok"
    inside = Namespace(65_537, opens_fuse=True, shared=True)
    assert look(conf=unnamed, namespace=inside)["storage.conf"].state.value == "problem"
    assert "~/.config" in look(conf=StorageConf(None), namespace=inside)["storage.conf"].mend


def test_storage_conf_is_read_as_podman_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "storage.conf"
    path.write_text(
        '[storage]\ndriver = "overlay"\ngraphroot = "/graph"\n'
        '[storage.options]\nadditionalimagestores = ["/a"]\nadditionallayerstores = ["/b:ref"]\n'
    )
    assert read_storage_conf(path) == StorageConf(
        path, "overlay", Path("/graph"), ("/a",), ("/b:ref",)
    )
    path.write_text("[storage\n")
    with pytest.raises(StorageConfError, match="is malformed"):
        read_storage_conf(path)
