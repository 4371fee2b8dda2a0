"""A node as people have it: containerd, and our daemon as its snapshotter."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from tests.support.debian_root import shared
from tests.support.instance import Instance, instance

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager
    from typing import Any

    from tests.support.containerd import RunningContainerd, Version

SNAPSHOTTER = "firstbyte"


class LazyNode:
    """A containerd whose CRI uses our snapshotter, and the daemon that serves it.

    `daemon` is its process; a test that ends it starts another one with `here.start()`.
    """

    def __init__(
        self, containerd: RunningContainerd, here: Instance, daemon: subprocess.Popen[bytes]
    ) -> None:
        self.containerd = containerd
        self.here = here
        self.daemon = daemon
        self.cri = containerd.cri

    def status(self) -> dict[str, Any]:
        """What `firstbyte status --json` says about the snapshotter."""
        found: dict[str, Any] = self.here.status()["containerd"]
        return found


@contextmanager
def lazy_node(
    run_containerd: Callable[..., AbstractContextManager[RunningContainerd]],
    version: Version,
    **fields: object,
) -> Iterator[LazyNode]:
    """Both, for as long as the block runs; `fields` are more of containerd's `Setup`."""
    with instance() as here, shared(here.base):
        daemon = here.start()
        with run_containerd(
            version,
            snapshotter=SNAPSHOTTER,
            proxy=here.state / "firstbyte.sock",
            proxy_root=here.root,
            binds=(here.base,),
            **fields,
        ) as containerd:
            yield LazyNode(containerd, here, daemon)
