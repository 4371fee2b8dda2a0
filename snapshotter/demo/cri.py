"""Asks a containerd to pull an image, as a kubelet does.

Only so does every containerd tell its snapshotter which image a layer is of: `ctr images pull`
of 1.6 has no such option, and fetches all layers before it unpacks the first. It takes one call
of the CRI; the container is then ctr's business, and needs no pod, sandbox image or network.

Source: k8s.io/cri-api, pkg/apis/runtime/v1/api.proto.
"""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING

from snapshotter.demo.errors import DemoError
from snapshotter.demo.interruption import POLL_SECONDS

# gRPC reads these when it is imported. What is still starting is no news; no child uses it.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
import grpc

if TYPE_CHECKING:
    from pathlib import Path

    from snapshotter.demo.interruption import Interruption

_LIST = "/runtime.v1.ImageService/ListImages"
_PULL = "/runtime.v1.ImageService/PullImage"
_IMAGE_OF_PULL = 1  # PullImageRequest.image, an ImageSpec
_NAME_OF_IMAGE = 1  # ImageSpec.image
_BYTES = 2  # wire type of strings and messages

_ANSWER_SECONDS = 5.0
_OPTIONS = (
    ("grpc.default_authority", "localhost"),  # Go refuses the socket's path, the default
    ("grpc.use_local_subchannel_pool", 1),  # no waiting because of another one that was not there
)


class ImageService:
    """The images of the containerd at a socket; call `close` at the end."""

    def __init__(self, socket: Path, interruption: Interruption) -> None:
        self._channel = grpc.insecure_channel(f"unix:{socket}", options=_OPTIONS)
        self._interruption = interruption

    def close(self) -> None:
        """Hang up; closing twice is fine."""
        self._channel.close()

    def answers(self) -> bool:
        """Whether it is ready to work: it listens before that."""
        try:
            self._channel.unary_unary(_LIST)(b"", timeout=_ANSWER_SECONDS, wait_for_ready=True)
        except grpc.RpcError:
            return False
        return True

    def pull(self, reference: str, seconds: float) -> None:
        """Pull an image for this machine's platform. Raises DemoError."""
        image = _field(_NAME_OF_IMAGE, reference.encode())
        request = _field(_IMAGE_OF_PULL, image)
        call = self._channel.unary_unary(_PULL).future(request, timeout=seconds)
        ended = threading.Event()
        call.add_done_callback(lambda _: ended.set())
        try:
            while not ended.wait(POLL_SECONDS):
                self._interruption.check()
        finally:
            call.cancel()  # nothing if it has ended
        if error := call.exception():
            raise DemoError(f"containerd cannot pull {reference}", hint=error.details())


def _field(number: int, content: bytes) -> bytes:
    """A protobuf field with bytes (protobuf.dev/programming-guides/encoding)."""
    left = len(content)
    length = bytearray()
    while left >= 0x80:
        length.append(left & 0x7F | 0x80)
        left >>= 7
    length.append(left)
    return bytes([number << 3 | _BYTES]) + length + content
