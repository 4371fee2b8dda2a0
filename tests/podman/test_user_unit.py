"""The unit for users under a real `systemd --user`."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from snapshotter.podman.graph_root import GraphRoot
from tests.support.instance import wait_until
from tests.support.rootless import Somebody, somebody
from tests.support.users_systemd import UsersSystemd, users_systemd
from tests.support.versions import REPOSITORY

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.registry import RunningRegistry

pytestmark = pytest.mark.root


@pytest.fixture
def user(registry: RunningRegistry) -> Iterator[Somebody]:
    with somebody(registry.host) as made:
        yield made


@pytest.fixture
def manager(user: Somebody) -> Iterator[UsersSystemd]:
    text = (Path(REPOSITORY) / "systemd/user/firstbyte.service").read_text()
    text = text.replace("/usr/local/bin/firstbyte", " ".join(user.program))
    log = f"[Service]\nStandardError=append:{user.base}/home/daemon.log\n"
    with users_systemd(user, {"firstbyte.service": f"{text}\n{log}"}) as made:
        yield made


def test_the_service_of_a_user(user: Somebody, manager: UsersSystemd, app: str) -> None:
    """It is ready when it is started, survives, and takes everything down when it is stopped."""
    manager.do("start", "firstbyte")
    pid = int(manager.show("firstbyte", "MainPID"))
    assert user.daemon == pid
    assert int(manager.show("firstbyte", "NFileDescriptorStore"))
    user.succeed("podman", "add", app)
    (image,) = GraphRoot(user.root / "podman/images").images()
    tree = user.root / "podman/images/overlay" / image.layer / "diff"
    os.kill(pid, signal.SIGKILL)
    assert user.podman.succeed("unshare", "ls", tree / "srv") == "big"
    wait_until(lambda: manager.show("firstbyte", "ActiveState") == "active")
    assert user.daemon == int(manager.show("firstbyte", "MainPID")) != pid
    assert manager.show("firstbyte", "NRestarts") == "1"
    assert manager.do("restart", "firstbyte") == ""
    assert user.podman.succeed("unshare", "cat", tree / "etc/name") == "third"
    manager.do("stop", "firstbyte")
    assert manager.show("firstbyte", "Result") == "success"
    assert not user.daemon
    said = (user.home / "daemon.log").read_text()
    assert said.count("going on with the file system") == 2
    assert said.count("ready: ") == 3
    assert not re.search("(WARNING|ERROR)", said)
