"""A node to fetch with: a store, a scheduler, and no long waits between attempts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from snapshotter.fetch import transfer
from snapshotter.registry.retry import RetryPolicy
from tests.support.fetching import open_node

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from tests.support.fetching import Node


@pytest.fixture(autouse=True)
def _quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "FOR_READERS", RetryPolicy(attempts=1 << 30, base=0.001))
    monkeypatch.setattr(transfer, "IN_BACKGROUND", RetryPolicy(attempts=5, base=0.001))


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[Node]:
    async with open_node(tmp_path / "store") as node:
        yield node
