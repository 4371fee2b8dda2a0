"""Starts are recorded by themselves, and what was recorded can be seen, moved and published."""

from __future__ import annotations

import json
import random
import shutil
import signal
from typing import TYPE_CHECKING, Any

import pytest

from index.file import FileIndex
from index.pack import PackDecoder, read_table
from index.tables import CHUNK_SIZE
from snapshotter.bench.coldstart.residency import resident
from snapshotter.daemon.places import Places
from tests.support.elves import make_elf
from tests.support.instance import firstbyte, instance, wait_until
from tests.support.layouts import write_layout
from tests.support.registry import skopeo_push
from tests.support.tars import file, tar

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.support.instance import Instance
    from tests.support.registry import RunningRegistry

SIZE = 2 * CHUNK_SIZE
NAMES = [f"f{number}" for number in range(10)]
STARTED = ("f7", "f2", "f5")
"""What a start of the image reads, in order. Files of two chunks each lie one behind the other."""


def content(name: str, seed: int = 0) -> bytes:
    return random.Random(f"{seed} {name}").randbytes(SIZE)


BASE = tar(*(file(name.encode(), content(name)) for name in NAMES))


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image of one layer."""
    path = tmp_path_factory.mktemp("image") / "layout"
    write_layout(path, [BASE])
    return path


@pytest.fixture(scope="module")
def shared(layout: Path, registry: RunningRegistry) -> str:
    """The image with its index, for tests that push nothing."""
    reference = registry.reference("shared")
    skopeo_push(layout, reference)
    firstbyte("index", "build", reference, "--push")
    return reference


@pytest.fixture
def image(layout: Path, tmp_path: Path, registry: RunningRegistry) -> str:
    """The same in a repository of the test's own."""
    reference = registry.reference(tmp_path.name.replace("_", "-"))
    skopeo_push(layout, reference)
    firstbyte("index", "build", reference, "--push")
    return reference


@pytest.fixture
def elsewhere() -> Iterator[Instance]:
    """Another node."""
    with instance() as made:
        yield made


def start(node: Instance, image: str, names: tuple[str, ...] = STARTED) -> None:
    with node.mounted(image) as tree:
        for name in names:
            assert (tree / name).read_bytes() == content(name)


def shown(node: Instance, what: str | Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(node.succeed("profile", "show", what, "--json"))
    return found


def files_of(profile: dict[str, Any]) -> list[str]:
    """The files of a profile, in the order in which they were touched first."""
    return list(dict.fromkeys(name for touch in profile["touches"] for name in touch["files"]))


@pytest.mark.parametrize("mode", ["fuse", "auto"])
def test_a_start_is_recorded_in_the_order_of_its_reads(
    here: Instance, shared: str, mode: str
) -> None:
    here.mode = mode
    start(here, shared)
    profile = shown(here, shared)
    assert profile["runs"] == 1
    assert profile["from"] == "recorded on this node"
    read = [name for name in files_of(profile) if name.removeprefix("/") in STARTED]
    assert read == [f"/{name}" for name in STARTED]
    # A file lies in three chunks, and the kernel reads up to 256 KiB ahead of each.
    assert len(profile["touches"]) <= 4 * len(STARTED)
    table = here.succeed("profile", "show", shared)
    assert "KiB" in table
    assert "/f7" in table


def forget_data(node: Instance) -> None:
    """Delete what a node without a daemon has of layers; it still knows the image."""
    shutil.rmtree(node.root / "layers")


def test_runs_are_merged(here: Instance, shared: str) -> None:
    here.mode = "fuse"  # or the kernel reads the second time what is all here by then
    start(here, shared)
    forget_data(here)
    start(here, shared, ("f7", "f9"))
    profile = shown(here, shared)
    assert profile["runs"] == 2
    assert {"/f7", "/f2", "/f5", "/f9"} <= {*files_of(profile)}
    (listed,) = here.succeed("profile", "ls", "--json").splitlines()
    assert json.loads(listed)["image"] == shared


def test_a_mounted_directory_names_its_image(here: Instance, shared: str) -> None:
    start(here, shared)
    with here.mounted(shared) as tree:
        assert shown(here, tree)["image"] == shared
    assert "this node has no startup profile" in here.fail("profile", "show", here.base)


def test_a_profile_is_replayed_from_the_layers(here: Instance, shared: str) -> None:
    start(here, shared)
    forget_data(here)
    with here.mounted(shared):
        fetched = here.status()["fetched"]
    assert fetched["startup"]["requests"] > 0
    assert fetched["blocked"]["requests"] == 0


def test_the_first_start_of_all_has_its_program_brought(
    elsewhere: Instance, tmp_path: Path, registry: RunningRegistry
) -> None:
    """Nobody reads anything here, and the background download has much to do before that."""
    program = make_elf(interpreter=b"/lib/ld.so", needed=[b"liba.so"])
    layer = tar(
        file(b"data", random.Random(1).randbytes(32 << 20)),
        *(file(name, program) for name in (b"bin/tool", b"lib/ld.so", b"lib/liba.so")),
    )
    write_layout(tmp_path / "tool", [layer], config={"config": {"Cmd": ["tool"]}})
    reference = registry.reference(tmp_path.name.replace("_", "-"))
    skopeo_push(tmp_path / "tool", reference)
    firstbyte("index", "build", reference, "--push")
    with elsewhere.mounted(reference):
        wait_until(lambda: elsewhere.status()["fetched"]["blocked"]["bytes"] > 0)


def test_images_that_share_a_layer_each_have_what_their_starts_read(
    here: Instance, shared: str, tmp_path: Path, registry: RunningRegistry
) -> None:
    """The kernel reads one flat file for both: its reads are noted for whoever is starting."""
    top = tar(file(b"top", b"small"))
    write_layout(tmp_path / "other", [BASE, top])
    other = registry.reference(tmp_path.name.replace("_", "-") + "-other")
    skopeo_push(tmp_path / "other", other)
    firstbyte("index", "build", other, "--push")
    tree = here.directory("first")
    here.succeed("mount", shared, tree)
    start(here, other, ("f3",))
    here.succeed("umount", tree)
    assert "/f3" in files_of(shown(here, other))


def test_exported_pushed_found_elsewhere_and_forgotten(
    here: Instance, elsewhere: Instance, image: str, tmp_path: Path
) -> None:
    assert "has no startup profile" in elsewhere.fail("profile", "push", image)
    start(here, image)
    here.succeed("profile", "export", image, "-o", tmp_path / "app.json")
    assert files_of(shown(here, image))
    exported = shown(elsewhere, tmp_path / "app.json")
    assert exported["from"] == "a file"
    pushed = json.loads(here.succeed("profile", "push", image, "--json"))
    again = json.loads(
        elsewhere.succeed("profile", "push", image, "--profile", tmp_path / "app.json", "--json")
    )
    assert again["artifact"] == pushed["artifact"]
    found = shown(elsewhere, image)
    assert found["from"] == "pushed to the registry"
    assert [(t["layer"], t["chunk"]) for t in found["touches"]] == [
        (t["layer"], t["chunk"]) for t in exported["touches"]
    ]
    here.succeed("profile", "rm", image)
    assert here.succeed("profile", "ls", "--json") == ""
    assert "has no startup profile" in here.fail("profile", "rm", image)


def test_a_profile_of_another_image_is_not_pushed(
    here: Instance, shared: str, tmp_path: Path, registry: RunningRegistry
) -> None:
    start(here, shared)
    here.succeed("profile", "export", shared, "-o", tmp_path / "app.json")
    write_layout(tmp_path / "other", [tar(file(b"x", b"y"))])
    other = registry.reference(tmp_path.name.replace("_", "-") + "-other")
    skopeo_push(tmp_path / "other", other)
    refusal = here.fail("profile", "push", other, "--profile", tmp_path / "app.json")
    assert "is not of the layers of" in refusal


def test_a_pack_is_made_of_what_a_node_has_recorded_or_nodes_have_pushed(
    here: Instance, image: str, tmp_path: Path
) -> None:
    assert "no startup profile was pushed" in here.fail(
        "index", "build", image, "--profile-from-registry"
    )
    start(here, image)
    chunks = shown(here, image)["chunks"]
    here.succeed("profile", "push", image)
    made = []
    for number, option in enumerate(("--profile-from-node", "--profile-from-registry")):
        output = tmp_path / f"{number}.fbx"
        built = json.loads(here.succeed("index", "build", image, option, "-o", output, "--json"))
        assert built["pack_chunks"] == chunks
        made.append(output.with_suffix(".fbp").read_bytes())
    assert made[0] == made[1]
    table = read_table(made[0], len(made[0]))
    assert table is not None
    assert sum(len(frame.places) for frame in table.frames) == chunks
    index = FileIndex.load((tmp_path / "0.fbx").read_bytes())
    table.check(index.digest, index.layers)
    decoder = PackDecoder(table.frames, index.layers)
    for (layer, chunk), data in decoder.feed(made[0][table.start :]):
        index.layers[layer].verify(chunk, data)


def test_the_next_node_starts_with_one_request_for_all_it_reads(
    here: Instance, elsewhere: Instance, image: str
) -> None:
    start(here, image)
    chunks = shown(here, image)["chunks"]
    built = json.loads(
        here.succeed("index", "build", image, "--profile-from-node", "--push", "--json")
    )
    told = json.loads(firstbyte("index", "show", image, "--json"))
    assert told["startup_pack"]["size"] == built["pack_bytes"]
    with elsewhere.mounted(image) as tree:
        wait_until(lambda: "its startup pack is here" in elsewhere.log())
        for name in STARTED:
            assert (tree / name).read_bytes() == content(name)
        fetched = elsewhere.status()["fetched"]
    assert fetched["startup"] == {"requests": 1, "bytes": built["pack_bytes"]}
    assert fetched["blocked"] == {"requests": 0, "bytes": 0}
    assert built["pack_chunks"] == chunks


@pytest.mark.parametrize("mode", ["fuse", "auto"])
def test_the_kernel_has_it_in_memory_before_a_container_reads_it(
    here: Instance, elsewhere: Instance, image: str, mode: str
) -> None:
    """Where its EROFS asks for it. Elsewhere nobody would look there."""
    start(here, image)
    here.succeed("index", "build", image, "--profile-from-node", "--push")
    touched = {touch["chunk"] * CHUNK_SIZE for touch in shown(here, image)["touches"]}
    elsewhere.config.write_text(f'[mounts]\nmode = "{mode}"\n')
    elsewhere.mode = mode
    with elsewhere.mounted(image):
        wait_until(lambda: "its startup pack is here" in elsewhere.log())
        (raw,) = Places(elsewhere.root, elsewhere.state).mount.glob("*.raw")
        if mode == "fuse":
            assert resident(raw) == []
        else:
            wait_until(lambda: _chunks(resident(raw)) == touched)


def _chunks(ranges: list[tuple[int, int]]) -> set[int]:
    """Where the chunks start that lie in some ranges of bytes."""
    return {position for begin, end in ranges for position in range(begin, end, CHUNK_SIZE)}


def test_what_a_kill_interrupts_is_brought_by_the_next_daemon(
    here: Instance, elsewhere: Instance, image: str
) -> None:
    """Only what is missing is asked for; what there is to know of the image is on the disk."""
    start(here, image)
    here.succeed("index", "build", image, "--profile-from-node", "--push")
    tree = elsewhere.directory("tree")
    process = elsewhere.start()
    elsewhere.succeed("mount", image, tree)
    process.kill()
    process.wait()
    process = elsewhere.start()
    wait_until(lambda: "is here" in elsewhere.log())
    for name in NAMES:
        assert (tree / name).read_bytes() == content(name)
    elsewhere.succeed("umount", tree)
    process.send_signal(signal.SIGINT)
    assert process.wait() == 0


def test_an_image_that_pins_its_index_finds_its_pack_all_the_same(
    here: Instance, elsewhere: Instance, shared: str
) -> None:
    """A profile is good for every compression of the layers."""
    start(here, shared)
    converted = shared.replace("/shared", "/converted")
    firstbyte("convert", shared, converted)
    here.succeed("index", "build", converted, "--profile-from-node", "--push")
    with elsewhere.mounted(converted) as tree:
        wait_until(lambda: "its startup pack is here" in elsewhere.log())
        assert (tree / STARTED[0]).read_bytes() == content(STARTED[0])
