"""How the demo's result reads."""

from __future__ import annotations

import json

import msgspec

from snapshotter.demo.timeline import FullPull, Lazy, Timeline

TIMELINE = Timeline(
    image="sample image",
    runtime="runc",
    link_mbit=200.0,
    layers=5,
    image_bytes=80_000_000,
    lazy=Lazy(
        mounted_seconds=0.5,
        ready_seconds=1.5,
        needed_bytes=5_000_000,
        fetched_bytes=20_000_000,
        requests=24,
        local_seconds=5.25,
    ),
    full_pull=FullPull(pulled_seconds=8.0, ready_seconds=9.0),
)


def test_as_text_it_says_all_in_a_few_lines() -> None:
    assert TIMELINE.as_text().splitlines() == [
        "sample image: 5 layers, 80.0 MB compressed, over 200 Mbit/s, started by runc",
        "",
        "  lazy       mounted      after   0.50 s",
        "             ready        after   1.50 s   5.0 MB (6 % of the image) were waited for",
        "                                           "
        "20.0 MB (25 % of the image) fetched, in 24 requests",
        "             fully local  after   5.25 s",
        "  full pull  pulled       after   8.00 s",
        "             ready        after   9.00 s",
        "",
        "The workload was ready 6.0 times sooner.",
    ]


def test_a_pull_is_called_so_in_place_of_a_mount() -> None:
    lazy = msgspec.structs.replace(TIMELINE.lazy, mounted_seconds=None, pulled_seconds=0.75)
    timeline = msgspec.structs.replace(TIMELINE, lazy=lazy, runtime="containerd")
    lines = timeline.as_text().splitlines()
    assert lines[0].endswith("started by containerd")
    assert lines[2] == "  lazy       pulled       after   0.75 s"
    value = json.loads(timeline.as_json())
    assert value["runtime"] == "containerd"
    assert value["lazy"]["pulled_seconds"] == 0.75
    assert "mounted_seconds" not in value["lazy"]


def test_as_json_it_is_one_object_with_the_numbers_as_measured() -> None:
    value = json.loads(TIMELINE.as_json())
    assert value["ratio"] == 6.0
    assert value["lazy"]["fetched_bytes"] == 20_000_000
    assert "pulled_seconds" not in value["lazy"]
    assert value["full_pull"] == {"pulled_seconds": 8.0, "ready_seconds": 9.0}
    assert value["image_bytes"] == 80_000_000
