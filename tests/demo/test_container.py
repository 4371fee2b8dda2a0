"""Containers of the demo, and when their workload counts as ready: runc on a real overlay."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from snapshotter.demo.container import Container
from snapshotter.demo.errors import DemoError
from snapshotter.demo.ready import HttpProbe, LineProbe, SignOfLifeProbe, wait_ready
from snapshotter.demo.workspace import mounts_below, stop_group
from snapshotter.registry.manifest import RunConfig
from tests.support.cgroups import cgroups_named

if TYPE_CHECKING:
    from pathlib import Path

    from snapshotter.demo.ready import Probe
    from snapshotter.demo.workspace import Workspace

pytestmark = pytest.mark.root

SECONDS = 30.0
DONE = LineProbe(re.compile("^done$"))


def shell(script: str, **image: object) -> RunConfig:
    """An image that runs a shell script."""
    return RunConfig(entrypoint=["/bin/sh", "-c"], cmd=[script], **image)  # type: ignore[arg-type]


def output(workspace: Workspace, rootfs: Path, image: RunConfig, **environment: str) -> list[str]:
    """What a workload prints before it says that it is done."""
    container = Container(workspace, "test", rootfs)
    container.start(image, environment)
    probe = LineProbe(re.compile("^done$"))
    wait_ready(probe, container, workspace.interruption, SECONDS)
    _, lines = container.output.wait(0, 0)
    container.stop()
    return lines[: lines.index("done")]


def test_it_runs_the_images_command_as_the_images_user(workspace: Workspace, rootfs: Path) -> None:
    image = shell("id -u; id -g; id -G; pwd; echo $HOME; echo done", user="app", working_dir="/etc")
    assert output(workspace, rootfs, image) == ["1234", "77", "77 88", "/etc", "/home/app"]


def test_its_environment_is_the_images_with_ours_on_top(workspace: Workspace, rootfs: Path) -> None:
    image = shell("echo $A $B; echo $PATH; echo done", env=["A=image", "B=image"])
    lines = output(workspace, rootfs, image, B="ours")
    assert lines[0] == "image ours"
    assert "/usr/bin" in lines[1].split(":")


def test_an_image_that_sets_nothing_gets_the_defaults(workspace: Workspace, rootfs: Path) -> None:
    image = RunConfig(entrypoint=["sh", "-c", "id -u; pwd; echo $HOME; echo done"])
    assert output(workspace, rootfs, image) == ["0", "/", "/root"]


def test_what_it_writes_does_not_reach_the_image(workspace: Workspace, rootfs: Path) -> None:
    image = shell("touch /new; echo changed > /etc/passwd; ls /new; echo done")
    assert output(workspace, rootfs, image) == ["/new"]
    assert not (rootfs / "new").exists()
    assert "root:" in (rootfs / "etc/passwd").read_text()


def test_it_has_devices_and_processes_of_its_own(workspace: Workspace, rootfs: Path) -> None:
    image = shell("echo $$; cat /dev/null; touch /dev/shm/x; ls /proc/1/status; echo done")
    assert output(workspace, rootfs, image) == ["1", "/proc/1/status"]


def test_after_stopping_nothing_is_left(workspace: Workspace, rootfs: Path) -> None:
    container = Container(workspace, "test", rootfs)
    container.start(shell("sleep 600 & sleep 600 & echo done; sleep 600"), {})
    wait_ready(DONE, container, workspace.interruption, SECONDS)
    assert cgroups_named(workspace.path.name)
    container.stop()
    container.stop()
    assert mounts_below(workspace.path) == []
    assert cgroups_named(workspace.path.name) == []
    assert workspace.run(["runc", "--root", workspace.path / "runc", "list", "-q"], seconds=9) == ""


def test_a_container_that_is_stopped_at_once_leaves_nothing(
    workspace: Workspace, rootfs: Path
) -> None:
    for attempt in range(5):
        container = Container(workspace, f"test-{attempt}", rootfs)
        container.start(shell("sleep 600"), {})
        workspace.interruption.sleep(0.02 * attempt)
        container.stop()
        assert cgroups_named(workspace.path.name) == []
    assert mounts_below(workspace.path) == []


def test_an_image_without_a_command_is_an_error(workspace: Workspace, rootfs: Path) -> None:
    with pytest.raises(DemoError, match="no command"):
        Container(workspace, "test", rootfs).start(RunConfig(), {})


def test_a_command_that_is_not_in_the_image_is_an_error_that_names_it(
    workspace: Workspace, rootfs: Path
) -> None:
    container = Container(workspace, "test", rootfs)
    container.start(RunConfig(cmd=["/bin/nothing"]), {})
    with pytest.raises(DemoError, match="/bin/nothing"):
        wait_ready(SignOfLifeProbe(), container, workspace.interruption, SECONDS)


@pytest.mark.parametrize(
    ("script", "probe"),
    [
        ("echo one; sleep 600", SignOfLifeProbe()),
        ("exit 0", SignOfLifeProbe()),
        ("echo one; echo two; sleep 600", LineProbe(re.compile("^tw"))),
        ("echo two; exit 1", LineProbe(re.compile("two"))),
    ],
    ids=["first line", "success", "line", "line and end"],
)
def test_signs_of_readiness(workspace: Workspace, rootfs: Path, script: str, probe: Probe) -> None:
    container = Container(workspace, "test", rootfs)
    container.start(shell(script), {})
    wait_ready(probe, container, workspace.interruption, SECONDS)


@pytest.mark.parametrize(
    ("script", "probe", "problem"),
    [
        ("exit 3", SignOfLifeProbe(), "status 3 before it was ready"),
        ("echo oops; exit 0", LineProbe(re.compile("two")), "status 0 before(.|\n)*oops"),
        ("echo one; sleep 600", LineProbe(re.compile("two")), "not ready within(.|\n)*one"),
    ],
    ids=["failure", "end without the line", "time"],
)
def test_a_workload_that_does_not_get_ready_is_an_error_with_its_last_words(
    workspace: Workspace, rootfs: Path, script: str, probe: Probe, problem: str
) -> None:
    container = Container(workspace, "test", rootfs)
    container.start(shell(script), {})
    seconds = 1.0 if "within" in problem else SECONDS
    with pytest.raises(DemoError, match=problem):
        wait_ready(probe, container, workspace.interruption, seconds)


SERVER = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        ready = self.path == "/ready"
        self.send_response(200 if ready or self.path == "/empty" else 503)
        self.end_headers()
        self.wfile.write(b"body" if self.path != "/empty" else b"")
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def test_http_readiness_is_status_200_with_a_body(workspace: Workspace, rootfs: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    container = Container(workspace, "test", rootfs)
    container.start(shell("sleep 600"), {})
    assert not HttpProbe(port, "/ready").ready(container)  # nobody listens
    server = workspace.start(
        [sys.executable, "-c", SERVER, str(port)],
        output=subprocess.DEVNULL,
        errors=subprocess.DEVNULL,
    )
    workspace.defer("stop the server", lambda: stop_group(server))
    wait_ready(HttpProbe(port, "/ready"), container, workspace.interruption, SECONDS)
    assert not HttpProbe(port, "/empty").ready(container)
    assert not HttpProbe(port, "/other").ready(container)
