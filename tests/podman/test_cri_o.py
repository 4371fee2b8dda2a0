"""Both stores as CRI-O uses them, by another program on the same libraries.

CRI-O reads storage.conf, looks images up, pulls and removes them with containers/storage and
containers/image, as skopeo does, which is a package. What it starts is mounted as podman's is.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.instance import Instance, instance
from tests.support.versions import REPOSITORY

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.root


@pytest.fixture
def node() -> Iterator[Instance]:
    """A daemon that runs as a service does, and the storage.conf of the documentation."""
    with instance() as made:
        made.start()
        (made.base / "storage.conf").write_text(documented(made))
        yield made


def documented(node: Instance) -> str:
    """What docs/podman.md says for both stores, with the directories of this node."""
    text = (Path(REPOSITORY) / "docs/podman.md").read_text()
    first, second = re.findall(r"```toml\n(\[storage.*?)```", text, flags=re.DOTALL)[:2]
    for there, here in (
        ("/var/lib/firstbyte", node.root),
        ("/var/lib/containers", node.base / "containers"),
        ("/run/containers", node.base / "run"),
    ):
        first, second = (part.replace(there, str(here)) for part in (first, second))
    head, table, option = second.partition("[storage.options]\n")
    assert (head, table) == ("", "[storage.options]\n")
    return first + option


def skopeo(node: Instance, *arguments: str) -> str:
    """What it prints; it has to succeed."""
    done = subprocess.run(
        ["skopeo", *arguments],
        env=os.environ | {"CONTAINERS_STORAGE_CONF": str(node.base / "storage.conf")},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr + node.log()
    return done.stdout


def counts(node: Instance) -> list[list[int]]:
    held = json.loads((node.root / "podman/layers.json").read_bytes())
    return [image["counts"] for image in held["images"]]


def test_an_image_is_there_that_nobody_pulled(node: Instance, app: str) -> None:
    node.succeed("podman", "add", app)
    found = json.loads(skopeo(node, "inspect", "--config", f"containers-storage:{app}"))
    assert found["config"]["Cmd"] == ["/bin/sh", "-c", "cat /etc/name"]
    digest = json.loads(node.succeed("podman", "ls", "--json"))[0]["digest"]
    by_digest = f"containers-storage:{app.rpartition(':')[0]}@{digest}"
    assert json.loads(skopeo(node, "inspect", "--config", by_digest))["config"] == found["config"]


def test_a_pull_downloads_no_layer(node: Instance, app: str) -> None:
    here = f"containers-storage:{app}"
    skopeo(node, "copy", "-q", "--src-tls-verify=false", f"docker://{app}", here)
    layers = list((node.base / "containers/storage/overlay").glob("*/diff"))
    assert [layer.is_symlink() for layer in layers] == [True] * 3
    assert counts(node) == [[1, 1, 1]]
    skopeo(node, "copy", "-q", here, f"oci:{node.base}/copy")  # all of it can be read
    skopeo(node, "delete", here)
    assert counts(node) == [[0, 0, 0]]
