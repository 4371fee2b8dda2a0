"""A real registry for all tests of a module, and an instance for each test."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.support.instance import Instance, instance
from tests.support.registry import RunningRegistry, docker_registry

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningRegistry]:
    with docker_registry(tmp_path_factory.mktemp("registry")) as running:
        yield running


@pytest.fixture
def here() -> Iterator[Instance]:
    with instance() as made:
        yield made
