"""`firstbyte doctor containerd`, beside a real containerd."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.doctor.documented import V1, snippets
from tests.support.instance import Instance, wait_until
from tests.support.nobody import as_nobody

if TYPE_CHECKING:
    from collections.abc import Iterator

START_SECONDS = 30  # only bounds a failure


@dataclass(frozen=True)
class Node:
    """Directories of a made-up node; its containerd has what docs/containerd.md says."""

    base: Path

    @property
    def config(self) -> Path:
        return self.base / "config.toml"

    @property
    def containerd(self) -> Path:
        return self.base / "c.sock"

    def doctor(self, *options: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "snapshotter.cli.main", "doctor", "containerd"]
        command += ["--config", str(self.config), "--containerd-address", str(self.containerd)]
        command += ["--root", str(self.base / "root"), "--state", str(self.base / "state")]
        return subprocess.run(
            [*command, *options], capture_output=True, text=True, timeout=120, check=False
        )

    def findings(self, *options: str) -> dict[str, dict[str, str]]:
        done = self.doctor("--json", *options)
        assert not done.stderr
        found: dict[str, Any] = json.loads(done.stdout)
        assert set(found) == {"findings"}
        for one in found["findings"]:
            assert set(one) == {"check", "state", "found", "mend"}
        return {one["check"]: one for one in found["findings"]}


@pytest.fixture
def node() -> Iterator[Node]:
    with tempfile.TemporaryDirectory(prefix="fb-") as directory:
        made = Node(Path(directory))
        text = snippets()[V1].replace("/run/firstbyte/", f"{directory}/state/")
        text = text.replace("/var/lib/firstbyte", f"{directory}/root")
        places = (
            "".join(f'{key} = "{made.base}/ct-{key}"\n' for key in ("root", "state"))
            + f'[grpc]\naddress = "{made.containerd}"\n'
        )
        places += f'[plugins."io.containerd.internal.v1.opt"]\npath = "{directory}/opt"\n'
        made.config.write_text(text.replace("version = 2\n", f"version = 2\n{places}"))
        yield made


@contextmanager
def containerd(node: Node) -> Iterator[None]:
    log = node.base / "containerd.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            ["containerd", "--config", node.config], stdout=output, stderr=output
        )
    try:
        deadline = time.monotonic() + START_SECONDS
        while b"successfully booted" not in log.read_bytes():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        yield
    finally:
        process.terminate()
        process.wait(START_SECONDS)


@pytest.mark.root
def test_a_containerd_that_runs(node: Node) -> None:
    with containerd(node):
        findings = node.findings()
        states = {check: one["state"] for check, one in findings.items()}
    assert states == {
        "containerd": "ok",
        "configuration": "ok",
        "proxy-plugin": "ok",
        "snapshotter": "ok",
        "labels": "ok",
        "registry-hosts": "ok",
        "user-namespaces": "skipped",
        "socket": "problem",
        "daemon": "skipped",
        "plugin-loaded": "ok",
        "kernel": "ok",
        "fuse": "ok",
        "overlayfs": "ok",
        "images": "skipped",
    }
    assert findings["socket"]["found"] == f"{node.base}/state/firstbyte.sock does not exist"
    assert "firstbyte daemon" in findings["socket"]["mend"]
    assert not (node.base / "root").exists()
    assert not (node.base / "state").exists()


@pytest.mark.root
def test_a_containerd_and_a_daemon_that_run(node: Node) -> None:
    here = Instance(node.base)
    here.config = node.base / "firstbyte.toml"  # config.toml is containerd's
    try:
        here.start()
        wait_until((here.state / "firstbyte.sock").exists)
        with containerd(node):
            findings = node.findings()
            assert node.doctor().returncode == 0
    finally:
        here.clean()
    assert findings["socket"]["state"] == "ok"
    assert findings["daemon"]["state"] == "ok"
    assert findings["images"]["found"] == "no image has been pulled yet"
    assert "crictl pull" in findings["images"]["mend"]


@pytest.mark.root
def test_a_containerd_with_another_configuration(node: Node) -> None:
    original = node.config.read_text()
    node.config.write_text(
        "version = 2\n" + original[original.index("root =") :].partition("[proxy_plugins")[0]
    )
    with containerd(node):
        node.config.write_text(original)
        finding = node.findings()["plugin-loaded"]
    assert finding["state"] == "problem"
    assert "restart containerd" in finding["mend"]


def test_lines_for_people_and_the_exit_status(node: Node) -> None:
    node.config.write_text("version = 2\n")
    done = node.doctor()
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    assert f"ok: configuration: {node.config} (version 2)" in lines
    assert any(line.startswith("problem: proxy-plugin: ") for line in lines)
    assert '      address = "' + f'{node.base}/state/firstbyte.sock"' in lines
    assert all(
        line.startswith(("ok:", "warning:", "problem:", "skipped:", "    ")) for line in lines
    )


def test_an_address_of_its_own(node: Node) -> None:
    found = node.findings("--address", "/somewhere/else.sock")
    assert found["proxy-plugin"]["state"] == "problem"
    assert "/somewhere/else.sock" in found["proxy-plugin"]["mend"]


def test_without_root_it_says_what_it_cannot_know(node: Node) -> None:
    node.base.chmod(0o755)
    node.config.chmod(0o644)
    program = (
        "import sys\n"
        "from snapshotter.cli.main import main\n"
        "main(['doctor', 'containerd', '--json', *sys.argv[1:]])"
    )
    done = as_nobody(
        program,
        "--config", node.config, "--containerd-address", node.containerd,
        "--state", node.base / "state", "--root", node.base / "root",
        imports="import snapshotter.cli.main, snapshotter.cli.doctor",
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    findings = {one["check"]: one for one in json.loads(done.stdout)["findings"]}
    assert findings["overlayfs"]["state"] == "skipped"
    assert findings["images"]["state"] == "skipped"
    assert findings["proxy-plugin"]["state"] == "ok"
