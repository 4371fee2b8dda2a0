"""What Prometheus reads, from a daemon that serves an image."""

from __future__ import annotations

import http.client
import random
import socket
from typing import TYPE_CHECKING

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.support import tars
from tests.support.instance import Instance, instance
from tests.support.layouts import write_layout

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from prometheus_client.metrics_core import Metric

pytestmark = pytest.mark.root


@pytest.fixture
def node() -> Iterator[Instance]:
    with instance() as made:
        yield made


def ask(address: Path | int, request: str = "GET /metrics") -> tuple[int, str]:
    """Status and body of one request."""
    method, path = request.split()
    connection = http.client.HTTPConnection("127.0.0.1", address if type(address) is int else 80)
    if not isinstance(address, int):
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.connect(str(address))
    connection.request(method, path)
    answer = connection.getresponse()
    body = answer.read().decode()
    connection.close()
    return answer.status, body


def figures(body: str) -> dict[tuple[str, str], float]:
    """Samples by name and labels."""
    families: list[Metric] = list(text_string_to_metric_families(body))
    return {
        (sample.name, ",".join(map(str, sample.labels.values()))): sample.value
        for family in families
        for sample in family.samples
    }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def test_the_figures_are_those_of_the_daemon(node: Instance, tmp_path: Path) -> None:
    address = node.base / "metrics.sock"
    node.config.write_text(f'[metrics]\naddress = "{address}"\n')
    layer = tars.tar(tars.file(b"big", random.Random(1).randbytes(1 << 20)))
    write_layout(tmp_path / "layout", [layer])
    target = node.directory("m")
    node.succeed("mount", f"oci:{tmp_path}/layout", target, "--mode", "fuse", "--wait-local")
    (target / "big").read_bytes()
    status, body = ask(address)
    assert status == 200
    found = figures(body)
    assert found["firstbyte_mounts", "fuse,local"] == 1
    assert found["firstbyte_fuse_requests_total", ""] > 0
    assert found["firstbyte_images", "local"] == 1
    assert found["firstbyte_images_local_bytes", ""] == len(layer)
    assert found["firstbyte_images_size_bytes", ""] == len(layer)
    assert found["firstbyte_reads_total", "hit"] > 0
    assert found["firstbyte_store_used_bytes", ""] >= len(layer)
    assert found["firstbyte_store_limit_bytes", ""] > found["firstbyte_store_used_bytes", ""]
    assert found["firstbyte_store_full", ""] == 0
    assert (
        found["firstbyte_read_stall_seconds_bucket", "+Inf"]
        == found["firstbyte_reads_total", "miss"]
    )
    for kind in ("blocked", "readahead", "startup", "fill"):
        assert ("firstbyte_fetch_received_bytes_total", kind) in found
    assert found["process_resident_memory_bytes", ""] > 1 << 20
    assert found["process_cpu_seconds_total", ""] > 0
    assert ask(address, "GET /")[0] == 404
    assert ask(address, "POST /metrics")[0] == 405
    assert ask(address, "HEAD /metrics") == (200, "")
    node.succeed("umount", target)


def test_names_are_as_prometheus_wants_them(node: Instance) -> None:
    port = free_port()
    node.config.write_text(f'[metrics]\naddress = "127.0.0.1:{port}"\n')
    node.start()
    _, body = ask(port)
    for family in text_string_to_metric_families(body):
        assert family.documentation
        assert family.type in ("counter", "gauge", "histogram", "info")
        if family.type == "histogram":
            assert family.name.endswith("_seconds")
        if "bytes" in family.name:
            assert family.name.endswith("_bytes")
        for sample in family.samples:
            assert sample.name.startswith(("firstbyte_", "process_"))
            if family.type == "counter":
                assert sample.name.endswith("_total")


def test_an_address_that_is_taken_is_logged_and_images_are_served(node: Instance) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        node.config.write_text(f'[metrics]\naddress = "127.0.0.1:{port}"\n')
        node.start()
        assert node.status()["pid"]
    assert f"cannot serve metrics at 127.0.0.1:{port}: Address already in use" in node.log()


def test_nobody_listens_unless_asked_to(node: Instance) -> None:
    node.start()
    assert "metrics at" not in node.log()
