"""Containers on lazily served images, started by real containerd through its CRI."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.support.instance import firstbyte

if TYPE_CHECKING:
    from tests.support.lazy_node import LazyNode

pytestmark = pytest.mark.root


def test_a_pod_runs_on_a_lazy_image(any_lazy_node: LazyNode, shell_image: str) -> None:
    firstbyte("index", "build", "--push", shell_image)
    any_lazy_node.cri.pull(shell_image)
    status = any_lazy_node.status()
    assert status["lazy_layers"] == 1
    assert status["fallbacks"] == []
    with any_lazy_node.cri.pod() as pod:
        container = pod.start(shell_image)
        done = container.execute("sh", "-c", "echo hello >/x; cat /x; cat /proc/self/mounts")
        assert done.stdout.startswith("hello\noverlay / overlay")
        (lower,) = (option for option in done.stdout.split(",") if option.startswith("lowerdir="))
        assert lower.startswith(f"lowerdir={any_lazy_node.here.state}/views/")
        assert ":" not in lower, "one lower directory"
    any_lazy_node.cri.remove_image(shell_image)
