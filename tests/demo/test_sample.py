"""The sample image, made, pushed, pulled by containerd and started: all but the lazy mount."""

from __future__ import annotations

import http.client
import io
import os
import sqlite3
import tarfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from snapshotter.demo import image
from snapshotter.demo.container import Container
from snapshotter.demo.containerd import Containerd
from snapshotter.demo.errors import DemoError
from snapshotter.demo.layout import HostFile, MadeFile, write_layer
from snapshotter.demo.ready import wait_ready
from snapshotter.demo.registry import LocalRegistry
from snapshotter.demo.run import sample_workload
from snapshotter.demo.sample import catalogue
from snapshotter.registry.errors import InvalidReferenceError
from snapshotter.registry.manifest import parse_config
from tests.support.sample import sample as shared_sample

if TYPE_CHECKING:
    from snapshotter.demo.layout import Member
    from snapshotter.demo.workspace import Workspace
    from tests.support.sample import Sample

pytestmark = pytest.mark.root


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Sample:
    return shared_sample(tmp_path_factory)


def test_it_is_of_realistic_size(sample: Sample) -> None:
    assert len(sample.layers) >= 3
    assert sum(layer.raw_size for layer in sample.layers) >= 100e6
    assert sum(layer.entries for layer in sample.layers) >= 5000


def test_its_tree_is_that_of_the_machine(sample: Sample) -> None:
    for name in ("usr/bin/python3", "usr/bin/bash", "usr/lib/python3.11/json/decoder.py", "tmp"):
        ours, theirs = (sample.root / name).lstat(), Path("/", name).lstat()
        assert (ours.st_mode, ours.st_uid, ours.st_gid) == (
            theirs.st_mode,
            theirs.st_uid,
            theirs.st_gid,
        )
    assert (sample.root / "usr/bin/bash").read_bytes() == Path("/usr/bin/bash").read_bytes()
    assert os.readlink(sample.root / "bin") == "usr/bin"
    assert (sample.root / "usr/bin/perl").samefile(sample.root / "usr/bin/perl5.36.0")


def test_it_has_accounts_of_its_own(sample: Sample) -> None:
    users = (sample.root / "etc/passwd").read_text().splitlines()
    assert users[0].startswith("root:")
    assert users[-1].startswith("app:x:1000:1000:")
    assert not (sample.root / "etc/shadow").exists()


def test_it_runs_after_a_full_pull(workspace: Workspace, sample: Sample) -> None:
    registry = LocalRegistry(workspace)
    registry.copy_in(f"oci:{sample.layout}:{image.TAG}", "sample:latest")
    reference = f"{registry.host}/sample:latest"
    answered = registry.answered()

    containerd = Containerd(workspace, "containerd")
    containerd.pull(reference)
    root = workspace.directory("full")
    containerd.mount(reference, root)
    assert registry.answered() - answered >= len(sample.layers) + 2  # manifest and configuration

    raw = workspace.run(
        ["skopeo", "inspect", "--config", "--raw", "--tls-verify=false", f"docker://{reference}"],
        seconds=30,
    )
    workload = sample_workload(60, 200, "runc")
    container = Container(workspace, "full-start", root)
    container.start(parse_config(raw.encode(), "sample").run, workload.environment)
    wait_ready(workload.probe(), container, workspace.interruption, workload.seconds)
    port = int(workload.environment["PORT"])
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("GET", "/?q=Maror")
    page = connection.getresponse().read().decode()
    connection.close()
    assert f"<h1>{catalogue.BOOKS} books</h1>" in page
    assert page.count("<tr>") == 21
    assert "<td>Maror" in page


def test_an_image_that_is_nowhere_is_an_error_that_names_it(workspace: Workspace) -> None:
    registry = LocalRegistry(workspace)
    with pytest.raises(DemoError, match=r"skopeo copy(.|\n)*no/such"):
        registry.copy_in(f"{registry.host}/no/such:image", "copy:latest")
    with pytest.raises(InvalidReferenceError, match="Malformed"):
        registry.copy_in("Malformed", "copy:latest")


def test_equal_layers_have_equal_digests(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "file").write_bytes(b"content")
    (source / "file").chmod(0o4750)
    os.utime(source / "file", ns=(5, 1_600_000_000_123_456_789))
    os.link(source / "file", source / "hard")
    (source / "soft").symlink_to("file")
    made = tarfile.TarInfo("made")
    made.size = 3
    members: list[Member] = [
        *(HostFile(f"d/{name}", source / name) for name in ("", "file", "hard", "soft")),
        MadeFile(made, b"abc"),
    ]

    first = write_layer(tmp_path, "one", members, lambda: None)
    blob = (tmp_path / first.digest.removeprefix("sha256:")).read_bytes()
    (source / "other").touch()  # changes the directory's time
    assert write_layer(tmp_path, "two", members, lambda: None) == first

    assert len(blob) == first.size
    with tarfile.open(fileobj=io.BytesIO(blob), mode="r:gz") as tar:
        directory, file, hard, soft, other = tar.getmembers()
        assert directory.isdir()
        assert (file.mode, file.mtime, file.uid) == (0o4750, 1_600_000_000, 0)
        assert (hard.islnk(), hard.linkname) == (True, "d/file")
        assert (soft.issym(), soft.linkname) == (True, "file")
        content = tar.extractfile(other)
        assert content
        assert content.read() == b"abc"


def test_building_ends_when_it_is_told_to(tmp_path: Path) -> None:
    class Enough(Exception):  # noqa: N818
        pass

    def check() -> None:
        raise Enough

    with pytest.raises(Enough):
        image.build(tmp_path / "layout", check)
    assert not (tmp_path / "layout/index.json").exists()


def test_the_database_is_the_same_on_every_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalogue, "BOOKS", 500)
    for name in ("one", "two"):
        catalogue.write(tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    connection = sqlite3.connect(tmp_path / "one")
    assert connection.execute("SELECT count(*) FROM book").fetchone() == (500,)
    connection.close()
