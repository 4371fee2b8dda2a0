"""Chain IDs: names for what layers give when they are applied one on another.

Source: OCI image spec 1.1, config.md, "Layer ChainID".
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from snapshotter.registry.digests import digest_of

if TYPE_CHECKING:
    from collections.abc import Sequence


def chain_ids(diff_ids: Sequence[str]) -> list[str]:
    """The chain ID after each layer, for diffIDs in order, the lowest first."""
    chains: list[str] = []
    for diff_id in diff_ids:
        chains.append(digest_of(f"{chains[-1]} {diff_id}".encode()) if chains else diff_id)
    return chains
