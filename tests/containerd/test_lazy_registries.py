"""Where a node's bytes come from: mirrors, and registries with passwords."""

from __future__ import annotations

import base64
import json
from typing import TYPE_CHECKING

import grpc
import pytest

from tests.support.lazy_workloads import (
    lazy_layers,
    printed,
    reasons,
    wait_local,
    workload_node,
)
from tests.support.registry import PASSWORD, USERNAME
from tests.support.shop import Shop, shop, workshop
from tests.support.tars import file, tar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager
    from pathlib import Path

    from tests.support.containerd import RunningContainerd
    from tests.support.lazy_node import LazyNode

pytestmark = pytest.mark.root

LAYERS = [workshop(), tar(file(b"name", b"here"))]


@pytest.fixture(scope="module")
def docker_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """docker's configuration of the daemon and of whoever builds file indexes; not there yet."""
    return tmp_path_factory.mktemp("docker") / "config.json"


@pytest.fixture(scope="module", params=["1.6", "2.1"])
def node(
    request: pytest.FixtureRequest,
    run_containerd: Callable[..., AbstractContextManager[RunningContainerd]],
    store: Shop,
    docker_config: Path,
) -> Iterator[LazyNode]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DOCKER_CONFIG", str(docker_config.parent))
        with workload_node(run_containerd, request.param) as made:
            store.let_in(made.containerd)
            yield made


def test_a_mirror_serves_both(node: LazyNode, store: Shop) -> None:
    """As in docs/containerd.md: one tree of hosts.toml for containerd and the daemon."""
    name = f"mirrored-{node.containerd.version}"
    with shop() as mirror:
        mirrored = mirror.put(name, LAYERS, index=True)
        image = store.put(name, LAYERS)  # the registry itself lacks the index, and is not asked
        assert image.digest == mirrored.digest
        _add_mirror(node, store, mirror)
        store.forget_requests()
        mirror.forget_requests()
        node.cri.pull(image.reference)
        assert lazy_layers(node.containerd, image) == [True, True]
        wait_local(node, image)
        assert printed(node, image, "cat /name") == "here"
        ours = mirror.asked_by_us()
        assert {request.path.rpartition("/")[2] for request in ours} >= {*image.layers}
        assert {request.query["ns"][0] for request in ours} == {store.registry.host}
        assert mirror.asked_by_containerd()
        assert store.registry.requests == []
    # The image is on the node, so nobody is asked when the mirror has gone.
    assert printed(node, image, "cat /name") == "here"
    _remove_mirror(node, store)


def _add_mirror(node: LazyNode, store: Shop, mirror: Shop) -> None:
    directory = node.containerd.hosts / store.registry.host
    directory.mkdir(exist_ok=True)
    (directory / "hosts.toml").write_text(
        f"""
server = "http://{store.registry.host}"
[host."http://{mirror.registry.host}"]
capabilities = ["pull", "resolve"]
"""
    )


def _remove_mirror(node: LazyNode, store: Shop) -> None:
    directory = node.containerd.hosts / store.registry.host
    (directory / "hosts.toml").unlink()
    directory.rmdir()
    store.let_in(node.containerd)


def test_a_private_image(node: LazyNode, store: Shop, docker_config: Path) -> None:
    """The kubelet's password is for containerd alone: the daemon needs one of its own."""
    docker_config.unlink(missing_ok=True)
    image = store.put("private", [tar(file(b"private")), *LAYERS])
    store.registry.users[USERNAME] = PASSWORD
    try:
        with pytest.raises(grpc.RpcError):
            node.cri.pull(image.reference)

        node.cri.pull(image.reference, auth=(USERNAME, PASSWORD))
        assert lazy_layers(node.containerd, image) == [False] * 3
        assert printed(node, image, "cat /name") == "here"
        assert list(reasons(node, image)) == ["registry"]
        node.cri.remove_image(image.reference)

        word = base64.b64encode(f"{USERNAME}:{PASSWORD}".encode()).decode()
        docker_config.write_text(json.dumps({"auths": {store.registry.host: {"auth": word}}}))
        node.cri.pull(image.reference, auth=(USERNAME, PASSWORD))
        assert lazy_layers(node.containerd, image) == [True] * 3
        assert printed(node, image, "cat /name") == "here"
        node.cri.remove_image(image.reference)
    finally:
        store.registry.users.clear()
