"""docs/containerd.md says what is so: its snippets are what containerd and the doctor take."""

from __future__ import annotations

import subprocess
import tomllib
from typing import TYPE_CHECKING, Any

import pytest

from snapshotter.daemon import config
from snapshotter.doctor.configuration import load
from snapshotter.doctor.facts import LocalFiles
from snapshotter.doctor.findings import State
from tests.doctor.documented import FIRSTBYTE, V1, V2_0, V2_1, snippets
from tests.doctor.nodes import NEWER, OLD, SPLIT, TRANSFER, examined

if TYPE_CHECKING:
    from pathlib import Path

    from snapshotter.doctor.versions import Version


def dumped(path: Path) -> dict[str, Any]:
    """The configuration as the installed containerd understands it."""
    done = subprocess.run(
        ["containerd", "--config", path, "config", "dump"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return tomllib.loads(done.stdout)


def test_there_is_a_snippet_for_every_version() -> None:
    assert set(snippets()) == {FIRSTBYTE, V1, V2_0, V2_1}


def test_the_daemon_reads_its_own_as_the_defaults() -> None:
    found = config.parse(snippets()[FIRSTBYTE].encode(), "snippet")
    assert found == config.Config(address=config.Config().socket)


@pytest.mark.parametrize(
    ("snippet", "version"),
    [(V1, OLD), (V1, NEWER), (V2_0, SPLIT), (V2_1, TRANSFER), (V2_1, None)],
)
def test_the_doctor_finds_nothing_wrong(snippet: str, version: Version | None) -> None:
    findings = examined(snippets()[snippet], version)
    wrong = {
        one.check: one.found
        for one in findings.values()
        if one.state in (State.PROBLEM, State.WARNING)
    }
    assert wrong == ({} if version else {"containerd": "none answers"})


def test_containerd_takes_the_one_for_its_version(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(snippets()[V1])
    settings = dumped(tmp_path / "config.toml")
    cri = settings["plugins"]["io.containerd.grpc.v1.cri"]
    assert cri["containerd"]["snapshotter"] == "firstbyte"
    assert cri["containerd"]["disable_snapshot_annotations"] is False
    assert cri["containerd"]["runtimes"]["runc"]["runtime_type"] == "io.containerd.runc.v2"
    assert cri["registry"]["config_path"] == "/etc/containerd/certs.d"
    proxy = settings["proxy_plugins"]["firstbyte"]
    assert proxy["type"] == "snapshot"
    assert proxy["address"] == "/run/firstbyte/firstbyte.sock"


@pytest.mark.parametrize("pattern", ["{}/more/*", "{}/more/a.toml", "more/a.toml", "more/*"])
def test_an_import_does_what_it_does_in_containerd(tmp_path: Path, pattern: str) -> None:
    main, more = tmp_path / "config.toml", tmp_path / "more/a.toml"
    imports = f'version = 2\nimports = ["{pattern.format(tmp_path)}"]'
    main.write_text(snippets()[V1].replace("version = 2", imports))
    more.parent.mkdir()
    more.write_text(
        'version = 2\n[plugins."io.containerd.grpc.v1.cri".containerd]\nsnapshotter = "other"\n'
    )
    dump = dumped(main)["plugins"]["io.containerd.grpc.v1.cri"]
    found = load(main, LocalFiles(), OLD)
    assert found.pulling["snapshotter"] == dump["containerd"]["snapshotter"]
    assert dump["containerd"]["disable_snapshot_annotations"] is found.pulling.get(
        "disable_snapshot_annotations", True
    )
    assert dump["registry"]["config_path"] == found.registry.get("config_path", "")
    assert (more in found.files) is (pattern != "more/*")  # which newer versions do import


def test_the_checks_have_stable_names() -> None:
    findings = examined(snippets()[V2_1], TRANSFER)
    assert set(findings) == {
        "containerd", "configuration", "proxy-plugin", "snapshotter", "labels", "registry-hosts",
        "user-namespaces", "socket", "daemon", "plugin-loaded", "kernel", "fuse", "overlayfs",
        "images",
    }  # fmt: skip
