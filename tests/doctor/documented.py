"""The snippets of docs/containerd.md, by the comment in their first line."""

from __future__ import annotations

import re
from pathlib import Path

DOCUMENT = Path(__file__).parents[2] / "docs/containerd.md"
_SNIPPET = re.compile(
    r"^```toml\n# (?P<title>[^\n]*)\n(?P<text>.*?)^```$", re.DOTALL | re.MULTILINE
)


def snippets() -> dict[str, str]:
    """Each of them, without the comment."""
    return {found["title"]: found["text"] for found in _SNIPPET.finditer(DOCUMENT.read_text())}


FIRSTBYTE = "/etc/firstbyte/config.toml"
V1 = "/etc/containerd/config.toml, containerd 1.6 and 1.7"
V2_0 = "/etc/containerd/config.toml, containerd 2.0"
V2_1 = "/etc/containerd/config.toml, containerd 2.1 and later"
