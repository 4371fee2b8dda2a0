"""The process that is the link: `python -m snapshotter.bench.link.network COUNTERS`.

It makes two network namespaces with one pair of interfaces between them, of limited bandwidth, and
relays connections from the loopback of the namespace in which it was started. It ends, and all of
that with it, when its standard input does.

    started in               near                                  far
    127.0.0.1:A  --relay-->  192.0.2.1 ==tbf== 192.0.2.2:5000     registry
    127.0.0.1:B  --relay------------------------> 127.0.0.1:5000  registry

It says in a line of JSON what there is; then it reads one profile a line, and answers each when it
is in force.

Sources: tc-tbf(8), ip-link(8).
"""

from __future__ import annotations

import os
import resource
import select
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from snapshotter.bench.link import namespaces
from snapshotter.bench.link.counters import Counters
from snapshotter.bench.link.profiles import LinkProfile
from snapshotter.bench.link.relay import Relay, Route

if TYPE_CHECKING:
    from collections.abc import Sequence

REGISTRY_PORT = 5000
"""Where a registry has to listen in the far namespace, on all addresses."""

_NEAR, _FAR = "192.0.2.1", "192.0.2.2"  # of TEST-NET-1 (RFC 5737)
_BITS = 30
_PACE_SECONDS = 0.002  # of bandwidth that go as one piece: steady, and still not too many pieces
_LEAST_PIECE, _LARGEST_PIECE = 3_000, 65_536  # bytes; the largest is the kernel's
_HEADERS = 2_000  # bytes that a piece may be longer than its content
_QUEUE_SECONDS = 0.02  # of bandwidth that wait before the link, or a round trip's if that is more
_LEAST_QUEUE = 128 << 10  # bytes
_BACKLOG = 512


class Network(msgspec.Struct, frozen=True):
    """`delayed` and `direct` are HOST:PORT, with the link in between and without. The namespaces
    are numbers of descriptors of the process `pid`."""

    pid: int
    near: int
    far: int
    delayed: str
    direct: str


class _Interfaces:
    def __init__(self) -> None:
        self.far = namespaces.make()
        self.near = namespaces.make()  # this process stays here
        self._in(self.far, "ip", "link", "set", "lo", "up")
        self._in(self.near, "ip", "link", "set", "lo", "up")
        pair = ("type", "veth", "peer", "name", "near", "netns", str(os.getpid()))
        self._in(self.far, "ip", "link", "add", "far", *pair)
        for namespace, name, address in self._ends():
            self._in(namespace, "ip", "address", "add", f"{address}/{_BITS}", "dev", name)
            self._in(namespace, "ip", "link", "set", name, "up")

    def shape(self, profile: LinkProfile) -> None:
        """Have the link that bandwidth, each way."""
        rate = profile.bandwidth / 8
        piece = round(min(max(rate * _PACE_SECONDS, _LEAST_PIECE), _LARGEST_PIECE))
        burst = max(piece, round(rate * _PACE_SECONDS)) + _HEADERS
        queue = max(_LEAST_QUEUE, round(rate * max(_QUEUE_SECONDS, profile.rtt)))
        shape = ("tbf", "rate", f"{round(profile.bandwidth)}bit", "burst", str(burst))
        for namespace, name, _ in self._ends():
            self._in(namespace, "ip", "link", "set", name, "gso_max_size", str(piece))
            self._in(
                namespace, "tc", "qdisc", "replace", "dev", name, "root", *shape,
                "limit", str(queue),
            )  # fmt: skip

    def connect(self) -> socket.socket:
        """To the registry, over the link."""
        return _connecting(_FAR)

    def connect_directly(self) -> socket.socket:
        """To the registry, on its own loopback."""
        namespaces.enter(self.far)
        try:
            return _connecting("127.0.0.1")
        finally:
            namespaces.enter(self.near)

    def _ends(self) -> Sequence[tuple[int, str, str]]:
        return ((self.near, "near", _NEAR), (self.far, "far", _FAR))

    def _in(self, namespace: int, *command: str) -> None:
        # Safe with one thread, and there is but one.
        subprocess.run(command, check=True, preexec_fn=partial(namespaces.enter, namespace))


def _connecting(address: str) -> socket.socket:
    made = socket.socket()
    made.setblocking(False)
    made.connect_ex((address, REGISTRY_PORT))  # whether it succeeds, its first use will tell
    return made


def main() -> None:
    """Until the end of standard input."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))  # two descriptors a connection
    listeners = [socket.create_server(("127.0.0.1", 0), backlog=_BACKLOG) for _ in range(2)]
    interfaces = _Interfaces()
    delayed, direct = Route(interfaces.connect), Route(interfaces.connect_directly)
    relay = Relay(Counters(Path(sys.argv[1])))
    profiles = msgspec.json.Decoder(LinkProfile)

    def obey(_: int) -> None:
        line = sys.stdin.buffer.readline()
        if not line:
            relay.stop()
            return
        profile = profiles.decode(line)
        interfaces.shape(profile)
        delayed.profile = profile
        _say(profile)

    relay.watch(sys.stdin.fileno(), select.EPOLLIN, obey)
    for listener, route in zip(listeners, (delayed, direct), strict=True):
        relay.listen(listener, route)
    hosts = (f"127.0.0.1:{listener.getsockname()[1]}" for listener in listeners)
    _say(Network(os.getpid(), interfaces.near, interfaces.far, *hosts))
    relay.run()


def _say(message: object) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(message) + b"\n")
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
