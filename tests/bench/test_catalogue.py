"""Lists of images to measure."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from snapshotter.bench.coldstart import catalogue
from snapshotter.bench.coldstart.catalogue import BUILT, PUBLIC
from snapshotter.bench.errors import BenchError

if TYPE_CHECKING:
    from pathlib import Path

REDIS = """
[[image]]
name = "redis"
group = "service"
reference = "docker.io/library/redis:7"
ready = { tcp = 6379, send = "PING\\r\\n", expect = '^\\+PONG' }
work = { http = "80/x?y", times = 3 }
"""


def test_a_list_says_what_is_started_and_when_it_is_ready() -> None:
    (image,) = catalogue.parse(REDIS, "list")
    assert (image.ready.tcp, image.ready.send) == (6379, "PING\r\n")
    assert image.work
    assert (image.work.http_target, image.work.times) == ((80, "/x?y"), 3)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("images = 3", "unknown field `images`"),
        ("[[image]", "Expected"),
        (REDIS.replace("reference", "refrence"), "refrence"),
        (REDIS.replace('reference = "docker.io/library/redis:7"', ""), "a reference or a recipe"),
        (REDIS.replace('"redis"', '"Redis!"'), "no name for an image"),
        (REDIS.replace("expect = '^\\+PONG'", "expect = '('"), "no pattern"),
        (REDIS.replace("tcp = 6379", "tcp = 6379, line = 'x'"), "one of"),
        (REDIS.replace('"80/x?y"', '"x"'), "PORT/PATH"),
        (REDIS + REDIS, "several images of the name redis"),
    ],
)
def test_a_list_that_is_wrong_is_refused_with_the_reason(text: str, reason: str) -> None:
    with pytest.raises(BenchError, match="list") as caught:
        catalogue.parse(text, "the list")
    assert reason in str(caught.value)


def test_images_are_chosen_by_name_or_group() -> None:
    images = catalogue.builtin(BUILT)
    assert [image.name for image in catalogue.choose(images, ["base", "layers"])] == [
        "base",
        "layers-1",
        "layers-10",
        "layers-50",
        "layers-120",
    ]
    assert catalogue.choose(images, []) == images
    with pytest.raises(BenchError, match="no image 'mysql'"):
        catalogue.choose(images, ["redis", "mysql"])


def test_what_comes_with_firstbyte_covers_what_people_run() -> None:
    built = {image.name: image for image in catalogue.builtin(BUILT)}
    assert {"base", "redis", "nginx", "postgres", "python-web", "node", "tomcat"} < built.keys()
    assert {"scipy", "torch", "big-sequential", "big-random", "reader-100"} < built.keys()
    assert all(image.recipe for image in built.values())
    assert all(image.reference for image in catalogue.builtin(PUBLIC))


def test_images_of_equal_layers_differ_in_their_recipes_alone() -> None:
    built = {image.name: image for image in catalogue.builtin(BUILT)}
    one, ten = built["layers-1"].recipe, built["layers-10"].recipe
    assert one
    assert ten
    assert one.packages == ten.packages
    assert one.key() != ten.key()


def test_a_list_may_be_a_file(tmp_path: Path) -> None:
    path = tmp_path / "images.toml"
    path.write_text(REDIS)
    assert [image.name for image in catalogue.load(path)] == ["redis"]
