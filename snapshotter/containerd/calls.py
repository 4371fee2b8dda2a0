"""The ten calls of containerd: from a request's bytes to our values, and back to responses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from snapshotter.containerd import messages
from snapshotter.containerd.errors import InvalidArgumentError
from snapshotter.containerd.messages import METHODS

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence

    from snapshotter.containerd.messages import Message, Method
    from snapshotter.containerd.snapshots import Info, Mount, Usage

T = TypeVar("T")


class Service(Protocol):
    """Does what containerd asks for. Every call may be cancelled, when its client gives up.

    Raises SnapshotError for what containerd should know, other FirstByteErrors for what may go away
    by itself, and OSError.
    """

    async def prepare(
        self, key: str, parent: str, labels: Mapping[str, str]
    ) -> Sequence[Mount]: ...
    async def view(self, key: str, parent: str, labels: Mapping[str, str]) -> Sequence[Mount]: ...
    async def mounts(self, key: str) -> Sequence[Mount]: ...
    async def commit(self, name: str, key: str, labels: Mapping[str, str], parent: str) -> None: ...
    async def remove(self, key: str) -> None: ...
    async def stat(self, key: str) -> Info: ...
    async def update(
        self, name: str, labels: Mapping[str, str], fieldpaths: Sequence[str]
    ) -> Info: ...
    async def list(self, filters: Sequence[str]) -> Sequence[Info]: ...
    async def usage(self, key: str) -> Usage: ...
    async def cleanup(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Call(Generic[T]):
    """One of the calls.

    `perform` asks the service, on the trio thread; `respond` makes the responses of what it said.
    """

    method: Method
    perform: Callable[[Service, Message], Awaitable[T]]
    respond: Callable[[Method, T], list[Message]]


async def _prepare(service: Service, request: Message) -> Sequence[Mount]:
    return await service.prepare(_key(request), request.parent, dict(request.labels))


async def _view(service: Service, request: Message) -> Sequence[Mount]:
    return await service.view(_key(request), request.parent, dict(request.labels))


async def _mounts(service: Service, request: Message) -> Sequence[Mount]:
    return await service.mounts(_key(request))


async def _commit(service: Service, request: Message) -> None:
    name, labels = _named(request.name), dict(request.labels)
    await service.commit(name, _key(request), labels, request.parent)


async def _remove(service: Service, request: Message) -> None:
    await service.remove(_key(request))


async def _stat(service: Service, request: Message) -> Info:
    return await service.stat(_key(request))


async def _update(service: Service, request: Message) -> Info:
    name, labels = _named(request.info.name), dict(request.info.labels)
    return await service.update(name, labels, tuple(request.update_mask.paths))


async def _list(service: Service, request: Message) -> Sequence[Info]:
    return await service.list(tuple(request.filters))


async def _usage(service: Service, request: Message) -> Usage:
    return await service.usage(_key(request))


async def _cleanup(service: Service, _request: Message) -> None:
    await service.cleanup()


def _key(request: Message) -> str:
    if not request.key:
        raise InvalidArgumentError("the request has no key")
    return str(request.key)


def _named(name: str) -> str:
    if not name:
        raise InvalidArgumentError("the request has no name")
    return name


CALLS: tuple[Call[Any], ...] = (
    Call(METHODS["Prepare"], _prepare, messages.mounts_response),
    Call(METHODS["View"], _view, messages.mounts_response),
    Call(METHODS["Mounts"], _mounts, messages.mounts_response),
    Call(METHODS["Commit"], _commit, messages.empty_response),
    Call(METHODS["Remove"], _remove, messages.empty_response),
    Call(METHODS["Stat"], _stat, messages.info_response),
    Call(METHODS["Update"], _update, messages.info_response),
    Call(METHODS["List"], _list, messages.infos_responses),
    Call(METHODS["Usage"], _usage, messages.usage_response),
    Call(METHODS["Cleanup"], _cleanup, messages.empty_response),
)
