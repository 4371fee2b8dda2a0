"""Pulling: what containerd and the daemon ask the registry for, and which images become lazy."""

from __future__ import annotations

import random
import re
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest
import zstandard

from tests.support.faults import Fault
from tests.support.instance import firstbyte
from tests.support.lazy_workloads import (
    PLAIN,
    Snapshots,
    containerd_status,
    ctr_pull,
    ctr_run,
    lazy_layers,
    printed,
    reasons,
    reconfigured,
    wait_local,
    workload_node,
)
from tests.support.shop import Layer, Shop, packed, shop, workshop
from tests.support.tars import file, tar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from tests.support.containerd import RunningContainerd, Version
    from tests.support.lazy_node import LazyNode
    from tests.support.shop import PushedImage

pytestmark = pytest.mark.root

BIG = random.Random(1).randbytes(700_000)  # three chunks
STRICT = 'images = { build = false, never = ["*/never:*"] }'


@pytest.fixture(scope="module")
def store() -> Iterator[Shop]:
    with shop() as made:
        made.registry.referrers_api = True
        yield made


@pytest.fixture(scope="module", params=["1.6", "2.1", "2.1 pulling by itself"])
def node(
    request: pytest.FixtureRequest,
    run_containerd: Callable[..., AbstractContextManager[RunningContainerd]],
    store: Shop,
) -> Iterator[LazyNode]:
    """Each way in which CRI pulls, and a daemon that builds file indexes where there are none."""
    version: Version = "1.6" if request.param == "1.6" else "2.1"
    by_itself = request.param.endswith("itself")
    with workload_node(run_containerd, version, local_pull=by_itself) as made:
        store.let_in(made.containerd)
        yield made


@pytest.fixture(scope="module", params=["1.6", "2.1"])
def strict_node(
    request: pytest.FixtureRequest,
    run_containerd: Callable[..., AbstractContextManager[RunningContainerd]],
    store: Shop,
) -> Iterator[LazyNode]:
    """A daemon that builds none, and refuses images that are called "never"."""
    with workload_node(run_containerd, request.param, STRICT) as made:
        store.let_in(made.containerd)
        yield made


@pytest.fixture(scope="module")
def mixed(store: Shop) -> PushedImage:
    """Four layers in all compressions, with a file index among its referrers."""
    layers = [
        packed(workshop(), "gzip"),
        packed(tar(file(b"big", BIG), file(b"name", b"lower")), "zstd"),
        packed(tar(file(b"plain", BIG)), "none"),
        packed(tar(file(b"name", b"upper")), "gzip"),
    ]
    return store.put("mixed", layers, index=True)


def test_the_first_layer_asks_for_the_image_and_the_others_for_nothing(
    node: LazyNode, store: Shop, mixed: PushedImage
) -> None:
    store.forget_requests()
    node.cri.pull(mixed.reference)
    assert lazy_layers(node.containerd, mixed) == [True] * 4

    wait_local(node, mixed)
    ours = [
        request
        for request in store.asked_by_us()
        if request.status != 206 and "/manifests/sha256-" not in request.path
    ]
    kinds = [request.path.split("/")[3] for request in ours]
    # The manifest and the file indexes there are; then configuration, the index there is, and its
    # content, some of them together.
    assert sorted(kinds[:2]) == ["manifests", "referrers"]
    assert sorted(kinds) == ["blobs", "blobs", "manifests", "manifests", "referrers"]
    assert len({request.path for request in ours}) == 5
    asked = {request.path.rpartition("/")[2] for request in store.asked_by_containerd()}
    assert asked.isdisjoint(mixed.layers)

    assert printed(node, mixed, "cat /name; cat /big /plain | wc -c") == f"upper{2 * len(BIG)}\n"
    node.cri.remove_image(mixed.reference)


def test_every_byte_of_a_layer_comes_once(node: LazyNode, store: Shop, mixed: PushedImage) -> None:
    """However many read it, and although the background download wants it as well."""
    store.forget_requests()
    node.cri.pull(mixed.reference)
    with node.cri.pod() as pod:
        containers = [pod.start(mixed.reference) for _ in range(2)]
        for container in containers:
            container.execute("sh", "-c", "cat /big /plain >/dev/null")
    wait_local(node, mixed)
    for layer in mixed.layers:
        asked = [request for request in store.asked_by_us() if request.path.endswith(layer)]
        ranges = [re.fullmatch(r"bytes=(\d+)-(\d+)", each.headers["range"]) for each in asked]
        spans = sorted((int(found[1]), int(found[2]) + 1) for found in ranges if found)
        assert len(spans) == len(asked)
        assert all(end <= start for (_, end), (start, _) in pairwise(spans))
        assert spans[-1][1] == len(store.registry.blobs[layer])
    node.cri.remove_image(mixed.reference)


def test_an_image_can_pin_its_file_index(node: LazyNode, store: Shop, mixed: PushedImage) -> None:
    """It is believed, whatever is among the referrers. They are asked for once, before anybody
    can know that it is pinned, because there may be a startup pack as well."""
    if ("converted", "latest") not in store.registry.manifests:
        firstbyte("convert", mixed.reference, store.reference("converted"))
    converted = store.image("converted")
    store.forget_requests()
    node.cri.pull(converted.reference)
    assert lazy_layers(node.containerd, converted) == [True] * 4
    paths = [request.path for request in store.asked_by_us()]
    asked = [path for path in paths if "/referrers/" in path or "/manifests/sha256-" in path]
    assert asked
    assert len(asked) == len(set(asked))
    assert printed(node, converted, "cat /name; cat /big | wc -c") == f"upper{len(BIG)}\n"
    node.cri.remove_image(converted.reference)


def test_a_node_builds_the_index_that_is_missing(node: LazyNode, store: Shop) -> None:
    """It reads each layer once, as a pull does, and downloads nothing again."""
    bare = store.put("bare", [workshop(), tar(file(b"big", BIG), file(b"name", b"bare"))])
    store.forget_requests()
    node.cri.pull(bare.reference)
    assert lazy_layers(node.containerd, bare) == [True, True]
    wait_local(node, bare)
    assert printed(node, bare, "cat /name; cat /big | wc -c") == f"bare{len(BIG)}\n"
    for layer in bare.layers:
        (request,) = (request for request in store.registry.asked(layer))
        assert request in store.asked_by_us()
    node.cri.remove_image(bare.reference)


def test_images_share_the_layers_they_have_in_common(node: LazyNode, store: Shop) -> None:
    """Nothing of them is fetched or kept twice."""
    shared = [workshop(), tar(file(b"big", BIG))]
    red, green = (
        store.put(name, [*shared, tar(file(b"name", name.encode()))], index=True)
        for name in ("red", "green")
    )
    with node.cri.pod():
        pass  # has its own image pulled, which counts as well
    store.forget_requests()
    before = containerd_status(node).lazy_layers
    for image, name in ((red, "red"), (green, "green")):
        node.cri.pull(image.reference)
        wait_local(node, image)
        assert lazy_layers(node.containerd, image) == [True] * 3
        assert printed(node, image, "cat /name; cat /big | wc -c") == f"{name}{len(BIG)}\n"
    assert containerd_status(node).lazy_layers == before + 4
    for layer in red.layers[:2]:
        assert store.registry.sent(layer) <= len(store.registry.blobs[layer])
    for image in (red, green):
        node.cri.remove_image(image.reference)


# --- images that are not lazy ---


def test_an_image_that_firstbyte_cannot_read(node: LazyNode, store: Shop) -> None:
    """containerd can: it has no limit for the window of a zstd stream."""
    raw = tar(file(b"name", b"wide"))
    parameters = zstandard.ZstdCompressionParameters.from_level(3, window_log=28)
    packer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    plain = packed(raw, "zstd")
    wide = Layer(packer.compress(raw) + packer.flush(), plain.diff_id, plain.media_type)
    image = store.put("wide", [workshop(), wide])
    node.cri.pull(image.reference)
    assert printed(node, image, "cat /name") == "wide"
    assert "window of 256 MiB" in reasons(node, image)["unsupported"]
    node.cri.remove_image(image.reference)


def _without_index(store: Shop) -> PushedImage:
    return _case(store, "without-index", index=False)


def _index_lost(store: Shop) -> PushedImage:
    image = _case(store, "index-lost")
    store.registry.blobs.pop(store.index_blob(image), None)
    return image


def _index_damaged(store: Shop) -> PushedImage:
    image = _case(store, "index-damaged")
    store.registry.inject(Fault(flip=100), path=store.index_blob(image))
    return image


def _referrers_secret(store: Shop) -> PushedImage:
    image = _case(store, "referrers-secret")
    store.registry.inject(Fault(status=403), path="/referrers/")
    return image


def _excluded(store: Shop) -> PushedImage:
    return _case(store, "never")


def _unreachable(store: Shop) -> PushedImage:
    """For the daemon, that is: containerd asks for the manifest first, and once."""
    image = _case(store, "unreachable")
    gone = Fault(status=503, headers=(("Retry-After", "3600"),))
    store.registry.inject(Fault(), path=f"/manifests/{image.digest}", times=1)
    store.registry.inject(gone, path=f"/manifests/{image.digest}")
    return image


def _case(store: Shop, name: str, *, index: bool = True) -> PushedImage:
    own = tar(file(b"name", name.encode()))
    return store.put(name, [workshop(), tar(file(b"big", BIG)), own, tar(file(b"x"))], index=index)


@pytest.mark.parametrize(
    ("kind", "reason", "prepare"),
    [
        ("no-index", "has no file index that can be used", _without_index),
        ("no-index", "has no file index that can be used", _index_lost),
        ("no-index", "has no file index that can be used", _index_damaged),
        ("no-index", "has no file index that can be used", _referrers_secret),
        ("policy", "images.never", _excluded),
        ("network", "server error 503", _unreachable),
    ],
)
def test_an_image_that_cannot_be_lazy_runs_all_the_same(
    strict_node: LazyNode,
    store: Shop,
    kind: str,
    reason: str,
    prepare: Callable[[Shop], PushedImage],
) -> None:
    """containerd unpacks it, and people learn why; the daemon finds out once."""
    image = prepare(store)
    store.forget_requests()
    strict_node.cri.pull(image.reference)
    store.registry.heal()
    ours = [request.path for request in store.asked_by_us()]
    assert len(ours) == len(set(ours))
    assert lazy_layers(strict_node.containerd, image) == [False] * 4
    assert printed(strict_node, image, "cat /name /x; cat /big | wc -c").endswith(f"{len(BIG)}\n")
    found = reasons(strict_node, image)
    assert list(found) == [kind]
    assert reason in found[kind]
    strict_node.cri.remove_image(image.reference)


def test_containerd_does_not_say_what_it_pulls(strict_node: LazyNode, mixed: PushedImage) -> None:
    """The configuration that people forget to write."""
    words = {
        "1.6": ("disable_snapshot_annotations = false", ""),
        "2.1": ("enable_remote_snapshot_annotations", "enable_nothing"),
    }
    with reconfigured(strict_node.containerd, *words[strict_node.containerd.version]):
        strict_node.cri.pull(mixed.reference)
        assert lazy_layers(strict_node.containerd, mixed) == [False] * 4
        status = strict_node.status()
        assert status["without_labels"] == 4
        assert printed(strict_node, mixed, "cat /name") == "upper"
        (found,) = [each for each in status["fallbacks"] if each["kind"] == "no-labels"]
        assert "containerd sends no image labels" in found["reason"]
        assert strict_node.here.log().count(found["reason"]) == 1
        strict_node.cri.remove_image(mixed.reference)


# --- without CRI ---


def test_ctr_pulls_lazily_if_it_says_what_it_pulls(
    strict_node: LazyNode, mixed: PushedImage
) -> None:
    """Through the transfer service, that is, which 1.6 does not have."""
    lazy = strict_node.containerd.version == "2.1"
    _pull_and_run(strict_node, mixed, lazy=lazy, local=False)


def test_ctr_pulls_the_ordinary_way_by_itself(strict_node: LazyNode, mixed: PushedImage) -> None:
    """It tells nothing then, not even that this is a pull."""
    _pull_and_run(strict_node, mixed, lazy=False, local=True)


def _pull_and_run(node: LazyNode, image: PushedImage, *, lazy: bool, local: bool) -> None:
    ctr_pull(node.containerd, image, "firstbyte", local=local)
    run = ("--", "/bin/cat", "/name")
    assert ctr_run(node.containerd, image, "firstbyte", *run, namespace=PLAIN) == "upper"
    with Snapshots(node.containerd, "firstbyte", PLAIN) as snapshots:
        assert snapshots.lazy_layers(image) == [lazy] * 4
    node.containerd.ctr("images", "rm", "--sync", image.reference, namespace=PLAIN)
