"""`firstbyte why`: what a start waited for, as text, JSON and picture."""

from __future__ import annotations

import json
import random
from typing import TYPE_CHECKING
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapshotter.cli.start_report import NO_FILE, lines, report
from snapshotter.cli.start_timeline import draw
from snapshotter.daemon.protocol import (
    StartRecord,
    TracedChunk,
    TracedExchange,
    TracedStall,
    TracedStep,
)
from tests.support import tars
from tests.support.instance import Instance, firstbyte, instance
from tests.support.layouts import write_layout

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

RECORD = StartRecord(
    reference="registry.example/<app>:1",
    digest="sha256:00",
    index="00",
    layers=["sha256:01"],
    began_ns=1,
    seconds=9.0,
    window=300.0,
    steps=[TracedStep("resolve", 0.0, 0.1), TracedStep("open", 0.1, 0.2)],
    stalls=[
        TracedStall(0, 0, 100, 1.0, 0.5),
        TracedStall(0, 200, 50, 1.25, 0.5),
        TracedStall(0, 5000, 10, 3.0, 2.0),
    ],
    exchanges=[
        TracedExchange(0, "blocked", 1.0, 1.2, 1.5, 1000),
        TracedExchange(0, "blocked", 1.25, 1.3, 1.75, 2000),
        TracedExchange(0, "fill", 8.0, -1.0, -1.0, 0),
    ],
    chunks=[
        TracedChunk(0, 0, 100, "blocked", True),
        TracedChunk(0, 1, 70, "readahead", False),
        TracedChunk(0, 2, 30, "", False),
        TracedChunk(0, 3, 1000, "fill", False),
    ],
    first_reads=1,
)


def files(layer: int, offset: int, length: int) -> bytes | None:
    return b"/lib\xff" if offset < 1000 else None


def test_a_report_sums_up_who_waited_for_what() -> None:
    found = report(RECORD, files)
    assert (found.stalls, found.waited, found.longest) == (3, 2.75, 2.0)
    none, lib = found.files
    assert (none.path, none.seconds) == (NO_FILE, 2.0)
    assert (lib.path, lib.seconds, lib.reads, lib.bytes) == ("/lib\\xff", 1.0, 2, 150)
    assert found.steps == {"resolve": 0.1, "open": 0.2}
    blocked = found.wire["blocked"]
    assert (blocked.requests, blocked.bytes, blocked.seconds) == (2, 3000, 0.75)
    assert found.wire["fill"].seconds == 1.0, "it is still under way"
    assert (found.fetched_bytes, found.unread_bytes, found.unread_chunks) == (200, 100, 2)
    text = "\n".join(lines(found))
    for part in ("resolve", "/lib\\xff", "3 reads, 2.750 s", "fetched and not read: 0.0 MB in 2"):
        assert part in text


def test_a_picture_has_every_request_and_every_stall() -> None:
    picture = ElementTree.fromstring(draw(RECORD))  # noqa: S314  (our own)
    titles = [element.text for element in picture.iter("{http://www.w3.org/2000/svg}title")]
    assert len(titles) == len(RECORD.steps) + len(RECORD.stalls) + len(RECORD.exchanges)
    assert "registry.example/<app>:1" in "".join(picture.itertext())


@given(
    st.lists(
        st.builds(
            TracedExchange,
            layer=st.just(0),
            kind=st.sampled_from(["blocked", "fill"]),
            at=st.floats(0, 100),
            answered=st.floats(-1, 100),
            ended=st.floats(-1, 100),
            bytes=st.integers(0, 1 << 40),
        )
    )
)
def test_any_record_can_be_drawn_and_summed_up(exchanges: list[TracedExchange]) -> None:
    record = StartRecord(
        reference="",
        digest="",
        index="",
        layers=[],
        began_ns=0,
        seconds=100.0,
        window=300.0,
        steps=[],
        stalls=[],
        exchanges=exchanges,
        chunks=[],
        first_reads=0,
    )
    ElementTree.fromstring(draw(record))  # noqa: S314
    assert [*lines(report(record, files))]


@pytest.fixture
def node() -> Iterator[Instance]:
    with instance() as made:
        yield made


@pytest.mark.root
def test_a_start_is_explained_by_directory_reference_and_digest(
    node: Instance, tmp_path: Path
) -> None:
    layout = tmp_path / "layout"
    layer = tars.tar(tars.file(b"big", random.Random(1).randbytes(1 << 20)))
    digest = write_layout(layout, [layer])
    firstbyte("index", "build", f"oci:{layout}", "--push")
    target = node.directory("m")
    picture = tmp_path / "start.svg"
    node.succeed("mount", f"oci:{layout}", target)
    (target / "big").read_bytes()
    text = node.succeed("why", target, "--svg", picture)
    assert f"oci:{layout} ({digest})" in text
    ElementTree.parse(picture)  # noqa: S314
    for name in (digest, digest[:20], f"oci:{layout}"):
        found = json.loads(node.succeed("why", name, "--json"))
        assert found["digest"] == digest
        assert found["steps"].keys() == {"resolve", "file index", "open"}
        assert sum(wire["bytes"] for wire in found["wire"].values()) > 1 << 20
        assert found["chunks_read"] > 0
    assert "no open image is nothing" in node.fail("why", "nothing")
    node.succeed("umount", target)


@pytest.mark.root
def test_without_a_daemon_nothing_is_on_record(node: Instance) -> None:
    assert "no daemon runs" in node.fail("why", "example/app")
