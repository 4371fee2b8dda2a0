"""The store stays within its bounds while images are served, on a disk that is too small."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from snapshotter.containerd.database import Database
from snapshotter.containerd.labels import TARGET
from snapshotter.containerd.lazy import LayerPlace
from snapshotter.containerd.metadata import Metadata
from tests.support import tars
from tests.support.instance import Instance, instance, wait_until
from tests.support.layouts import write_layout

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.root

MIB = 1 << 20
DISK = 40 * MIB
LIMIT = 24 * MIB  # 60 %

SIZES = {"big": 36 * MIB, "middle": 14 * MIB, "other": 12 * MIB}


@cache
def content(tag: str) -> bytes:
    """Of an image's one file."""
    return random.Random(1 + list(SIZES).index(tag)).randbytes(SIZES[tag])


@pytest.fixture(scope="module")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A layout with the images big, middle and other, each with one file, and a small layer."""
    path = tmp_path_factory.mktemp("layouts")
    for tag in SIZES:
        data = tars.tar(tars.file(b"data", content(tag)))
        layers = [data, tars.tar(tars.file(b"tag", tag.encode()))]
        write_layout(path, layers, compress="none", tag=tag)
    return path


@pytest.fixture
def node(request: pytest.FixtureRequest) -> Iterator[Instance]:
    """An instance whose root is on a disk of its own, with all of it to use."""
    with instance() as made, small_disk(made.base, getattr(request, "param", "tmpfs")) as disk:
        made.root = disk / "root"
        made.config.write_text('[store]\nkeep_free = "0%"\n')
        yield made


@contextmanager
def small_disk(base: Path, kind: str) -> Iterator[Path]:
    disk, image = base / "disk", base / "disk.img"
    disk.mkdir()
    if kind == "ext4":
        with image.open("wb") as file:
            file.truncate(DISK)
        # Without a mount table to look into: it may have mounts whose daemon is dead.
        make = 'mount -t tmpfs none /proc && exec mkfs.ext4 -F -q -m 0 -O ^has_journal "$0"'
        subprocess.run(["unshare", "-m", "sh", "-c", make, image], check=True)
        subprocess.run(["mount", "-o", "loop", image, disk], check=True)
    else:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}", "none", disk], check=True)
    try:
        yield disk
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


def mount(node: Instance, layouts: Path, tag: str, mode: str = "fuse", *options: str) -> Path:
    target = node.base / tag
    target.mkdir(exist_ok=True)
    node.succeed("mount", f"oci:{layouts}:{tag}", target, "--mode", mode, *options)
    return target


def state(node: Instance, tag: str) -> str:
    (found,) = [one for one in node.status()["mounts"] if one["target"].endswith(f"/{tag}")]
    return str(found["state"])


def df(node: Instance) -> dict[str, object]:
    found: dict[str, object] = json.loads(node.succeed("df", "--json"))
    return found


def present(node: Instance) -> list[str]:
    """The tags of the images that have anything in the store."""
    images: list[dict[str, str]] = df(node)["images"]  # type: ignore[assignment]
    return [image["reference"].rpartition(":")[2] for image in images]


def used(node: Instance) -> int:
    return sum(512 * path.lstat().st_blocks for path in node.root.rglob("*") if path.is_file())


def random_reads_are_right(target: Path, data: bytes, seed: int) -> bool:
    source = random.Random(seed)
    descriptor = os.open(target / "data", os.O_RDONLY)
    try:
        offsets = [source.randrange(len(data)) for _ in range(300)]
        return all(os.pread(descriptor, 9000, at) == data[at : at + 9000] for at in offsets)
    finally:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def test_an_image_that_is_larger_than_the_limit_is_served_all_the_same(
    node: Instance, layouts: Path
) -> None:
    node.config.write_text('[store]\nlimit = "60%"\nkeep_free = "0%"\n')
    target = mount(node, layouts, "big")
    wait_until(lambda: "the store's limit holds it back" in node.succeed("status"))
    assert (target / "data").read_bytes() == content("big")
    assert used(node) <= LIMIT
    for seed in range(3):
        assert random_reads_are_right(target, content("big"), seed)
        assert used(node) <= LIMIT
    wait_until(lambda: node.status()["store"]["evicted"] > 0)
    assert state(node, "big") == "serving"


def test_what_nobody_uses_makes_room_the_oldest_first(node: Instance, layouts: Path) -> None:
    for tag in ("middle", "other"):
        mount(node, layouts, tag, "fuse", "--wait-local")
        node.succeed("umount", node.base / tag)
        wait_until(lambda: not node.has_daemon())
    target = mount(node, layouts, "big")
    wait_until(lambda: "the store's limit holds it back" in node.succeed("status"))
    assert (target / "data").read_bytes() == content("big")
    wait_until(lambda: present(node) == ["big"])  # fill, which is held back, has asked for that
    assert len(list((node.root / "indexes").iterdir())) == 1
    assert node.log().index("middle is forgotten") < node.log().index("other is forgotten")


def test_a_disk_that_others_fill_is_read_through_and_goes_on_when_there_is_room(
    node: Instance, layouts: Path
) -> None:
    filler = node.root.parent / "somebody-else"
    filler.write_bytes(bytes(DISK - 10 * MIB))
    target = mount(node, layouts, "middle")
    assert (target / "data").read_bytes() == content("middle")
    assert random_reads_are_right(target, content("middle"), 1)
    wait_until(lambda: "holds it back" in node.succeed("status"))
    filler.unlink()
    wait_until(lambda: state(node, "middle") == "local")
    assert random_reads_are_right(target, content("middle"), 2)
    wait_until(lambda: not node.status()["store"]["problem"])  # it is told for a while longer


def test_a_disk_that_is_full_to_the_last_byte_is_no_error(node: Instance, layouts: Path) -> None:
    target = mount(node, layouts, "big")
    filler = f"of={node.root.parent}/somebody-else"
    done = subprocess.run(
        ["dd", "if=/dev/zero", filler, "bs=64k"], capture_output=True, check=False
    )
    assert b"No space left" in done.stderr
    assert (target / "data").read_bytes() == content("big")
    assert random_reads_are_right(target, content("big"), 1)
    assert "ERROR" not in node.log()


def test_an_image_that_was_local_is_serving_again_when_some_of_it_goes(
    node: Instance, layouts: Path
) -> None:
    target = mount(node, layouts, "middle", "fuse", "--wait-local")
    assert state(node, "middle") == "local"
    big = mount(node, layouts, "big")
    assert (big / "data").read_bytes() == content("big")

    def gives_way() -> bool:
        """While the store is measured, what is written counts twice, and a read that is over by
        then may have left it short of the mark at which chunks go: somebody has to go on."""
        assert random_reads_are_right(big, content("big"), 2)
        return state(node, "middle") == "serving"

    wait_until(gives_way)
    assert (target / "data").read_bytes() == content("middle")
    node.succeed("umount", big)
    node.succeed("gc", "--all")
    wait_until(lambda: state(node, "middle") == "local")
    assert random_reads_are_right(target, content("middle"), 1)


@pytest.mark.parametrize("node", ["ext4"], indirect=True)
def test_nothing_goes_from_under_the_kernel(node: Instance, layouts: Path) -> None:
    """Not while it is mounted, and not while only another mount namespace has it."""
    node.start()
    target = mount(node, layouts, "middle", "native")
    big = mount(node, layouts, "big")
    assert (big / "data").read_bytes() == content("big")
    assert random_reads_are_right(big, content("big"), 1)
    Path("/proc/sys/vm/drop_caches").write_text("3")
    assert (target / "data").read_bytes() == content("middle")
    command = [
        "unshare",
        "--mount",
        "--propagation",
        "private",
        "sh",
        "-c",
        "echo; exec sleep 1000",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as container:
        try:
            assert container.stdout is not None
            container.stdout.readline()
            node.succeed("umount", target)
            node.succeed("umount", big)
            node.succeed("gc", "--all")
            Path("/proc/sys/vm/drop_caches").write_text("3")
            inside = Path(f"/proc/{container.pid}/root") / str(target)[1:] / "data"
            assert inside.read_bytes() == content("middle")
            assert used(node) >= SIZES["middle"]
        finally:
            container.kill()
    wait_until(lambda: node.succeed("gc", "--all") is not None and used(node) < MIB)


@pytest.mark.parametrize("node", ["ext4"], indirect=True)
def test_nothing_goes_of_a_layer_that_the_kernel_reads_from_the_disk(
    node: Instance, layouts: Path
) -> None:
    """Whichever daemon has mounted it."""
    daemon = node.start()
    mount(node, layouts, "middle", "fuse", "--wait-local")
    node.succeed("umount", node.base / "middle")
    target = mount(node, layouts, "middle", "erofs")
    assert "2 of 2 layers come from the disk" in node.log()
    big = mount(node, layouts, "big")
    for seed in range(2):
        assert random_reads_are_right(big, content("big"), seed)
        assert (big / "data").read_bytes() == content("big")
        Path("/proc/sys/vm/drop_caches").write_text("3")
        assert (target / "data").read_bytes() == content("middle")
        daemon.kill()
        daemon.wait()
        daemon = node.start()
    assert "that were in use have been evicted" in node.log()
    node.succeed("umount", big)
    node.succeed("umount", target)
    wait_until(lambda: node.succeed("gc", "--all") is not None and used(node) < MIB)


def test_without_a_daemon_gc_and_df_go_by_what_is_on_disk(node: Instance, layouts: Path) -> None:
    for tag in ("middle", "other"):
        mount(node, layouts, tag, "fuse", "--wait-local")
        node.succeed("umount", node.base / tag)
        wait_until(lambda: not node.has_daemon())
    (other, middle) = json.loads(node.succeed("df", "--json"))["images"]
    assert other["reference"].endswith(":other")
    assert middle["local"] == middle["size"] > SIZES["middle"]
    assert middle["exclusive"] > SIZES["middle"]
    assert (middle["shared"], middle["users"]) == (0, [])
    directory = node.root / "containerd"
    directory.mkdir(exist_ok=True)
    database = Database(directory / "metadata.db")
    place = LayerPlace(image=middle["digest"], depth=1, content_key=middle["layers"][0], top=False)
    Metadata(database).create_lazy(("name",), "", {TARGET: "sha256:00"}, place)
    database.close()
    leftover = node.root / "indexes" / ".new-abc"
    leftover.write_bytes(b"?")
    orphan = node.root / "layers" / ("ab" * 32)
    orphan.mkdir()
    would = json.loads(node.succeed("gc", "--all", "--dry-run", "--json"))
    assert (would["dry_run"], would["freed"]) == (True, 0)
    assert leftover.exists()
    assert orphan.exists()
    done = json.loads(node.succeed("gc", "--all", "--json"))
    assert done["garbage"] == would["garbage"]
    assert done["freed"] > SIZES["other"]
    assert {item["name"] for item in done["garbage"]} == {
        *(str(leftover), orphan.name, *other["layers"], other["digest"]),
        *(item["name"] for item in done["garbage"] if item["kind"] == "index"),
    }
    assert not leftover.exists()
    assert not orphan.exists()
    (left,) = json.loads(node.succeed("df", "--json"))["images"]
    assert left["users"] == ["containerd (1 snapshots)"]
    assert left["local"] == left["size"]
    mount(node, layouts, "middle", "fuse")
    assert state(node, "middle") == "local"


def test_a_killed_daemon_leaves_a_store_that_the_next_believes_rightly(
    node: Instance, layouts: Path
) -> None:
    """It is killed while it evicts."""
    node.config.write_text('[store]\nlimit = "60%"\nkeep_free = "0%"\n')
    process = node.start()
    target = mount(node, layouts, "big")
    for seed in range(2):
        assert random_reads_are_right(target, content("big"), seed)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process = node.start()
    assert (target / "data").read_bytes() == content("big")
    assert "damaged" not in node.log()
    assert used(node) <= LIMIT


def test_on_a_machine_without_a_store_there_is_nothing_to_tell(node: Instance) -> None:
    assert df(node)["images"] == []
    assert node.succeed("gc") == "0.0 MB freed\n"
