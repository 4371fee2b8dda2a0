"""A node, on which images are looked into."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.support.fetching import open_node

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from tests.support.fetching import Node


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[Node]:
    async with open_node(tmp_path / "store") as node:
        yield node
