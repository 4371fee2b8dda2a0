"""From what a person types to an image that can be read or written."""

from __future__ import annotations

from typing import TYPE_CHECKING

from snapshotter.registry.client import Registry
from snapshotter.registry.layout import Layout
from snapshotter.registry.mirrors import Repository
from snapshotter.registry.push import RegistrySink
from snapshotter.registry.reference import LAYOUT_PREFIX, Reference

if TYPE_CHECKING:
    from snapshotter.registry.credentials import CredentialStore
    from snapshotter.registry.hosts_tree import HostsTree
    from snapshotter.registry.image import ImageSink, ImageSource
    from snapshotter.registry.transport import Transport


class Locations:
    """Opens images by name: `oci:PATH[:TAG]` or a reference. Shares connections and credentials."""

    def __init__(
        self,
        transport: Transport,
        credentials: CredentialStore,
        *,
        hosts: HostsTree | None = None,
        plain_http: bool | None = None,
    ) -> None:
        """`hosts` knows the registries' mirrors; without it there are none. `plain_http` is about
        the registries themselves, as for `endpoint_of`."""
        self._transport = transport
        self._credentials = credentials
        self._hosts = hosts
        self._plain_http = plain_http

    def source(self, text: str) -> ImageSource:
        """The image to read. Raises InvalidReferenceError or UnsupportedError."""
        if text.startswith(LAYOUT_PREFIX):
            return Layout.parse(text)
        return Registry(self._repository(text))

    def sink(self, text: str) -> ImageSink:
        """The image to write. Raises as `source`."""
        if text.startswith(LAYOUT_PREFIX):
            return Layout.parse(text)
        return RegistrySink(self._repository(text))

    def _repository(self, text: str) -> Repository:
        return Repository(
            Reference.parse(text),
            self._transport,
            self._credentials,
            hosts=self._hosts,
            plain_http=self._plain_http,
        )
