"""`podman run --rootfs` on a tree that `firstbyte mount` shows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.support.instance import Instance
    from tests.support.podman import Podman

pytestmark = pytest.mark.root


def test_a_mounted_tree_is_a_root_file_system(here: Instance, any_podman: Podman, app: str) -> None:
    with here.mounted(app) as tree:
        command = ("/bin/sh", "-c", "echo mine > /etc/name && cat /etc/name")
        assert any_podman.succeed("run", "--rm", "--rootfs", f"{tree}:O", *command) == "mine"
        assert (tree / "etc/name").read_text() == "third\n"
