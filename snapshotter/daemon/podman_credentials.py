"""What podman hands over about who may pull an image (`additional-layer-store-auth-helper`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from snapshotter.registry.auth import IdentityToken, Password
from snapshotter.registry.reference import Reference

if TYPE_CHECKING:
    from snapshotter.daemon.podman_layers import PodmanLayers
    from snapshotter.daemon.protocol import HandedCredential, PodmanCredentialsRequest
    from snapshotter.registry.auth import Credential
    from snapshotter.registry.handed import HandedCredentials


class PodmanCredentials:
    """Passes them on. For the trio thread."""

    def __init__(self, handed: HandedCredentials, layers: PodmanLayers | None) -> None:
        """`layers` is the layer store, if this daemon has one."""
        self._handed = handed
        self._layers = layers

    def take(self, request: PodmanCredentialsRequest) -> None:
        """Use them for these images from now on. podman hands over nothing where it needed nothing:
        then what it said before counts no more. Raises InvalidReferenceError, UnsupportedError."""
        named = {Reference.parse(text): one for text, one in request.credentials.items()}
        for reference, handed in named.items():
            self._handed.put(reference, _credential(handed))
        if self._layers is not None:
            self._layers.ask_again()


def _credential(handed: HandedCredential) -> Credential | None:
    if handed.identity_token:
        return IdentityToken(handed.identity_token)
    return Password(handed.username, handed.password) if handed.password else None
