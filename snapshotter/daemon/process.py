"""The daemon process, from taking its lock to leaving nothing behind."""

from __future__ import annotations

import functools
import logging
import resource
import signal
from contextlib import AsyncExitStack, ExitStack, contextmanager
from typing import TYPE_CHECKING

import trio

from snapshotter.daemon.containerd import serve_containerd
from snapshotter.daemon.errors import DaemonError
from snapshotter.daemon.images import Images
from snapshotter.daemon.places import Places, locked
from snapshotter.daemon.records import Records, detach_dead_mounts
from snapshotter.daemon.server import Connections, listen
from snapshotter.daemon.service import Service
from snapshotter.fetch.scheduler import open_scheduler
from snapshotter.fuse import session
from snapshotter.fuse.operations import Operations
from snapshotter.fuse.view import Views
from snapshotter.images.discovery import Trust
from snapshotter.nursery import open_nursery
from snapshotter.registry.credentials import CredentialStore
from snapshotter.registry.hosts_tree import HostsTree
from snapshotter.registry.locations import Locations
from snapshotter.registry.transport import Transport
from snapshotter.store.flusher import keep_flushed
from snapshotter.store.layers import LayerStore

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from snapshotter.daemon.config import Config

log = logging.getLogger(__name__)

_LOCK_SECONDS = 15.0  # a predecessor that is ending may hold the lock for so long
_LOCK_POLL_SECONDS = 0.02
_DRAIN_SECONDS = 5.0  # for interrupted requests to clean up, and their clients to be told
_CLOSE_SECONDS = 10.0  # for mounts to be taken down; what is left then, the kernel detaches
_FIRST_CLIENT_SECONDS = 60.0  # a daemon nobody talks to was started by somebody who gave up


async def run(config: Config, *, stay: bool, ready: Callable[[], None]) -> None:
    """Serve until told to stop; without `stay` only until nothing is mounted any more.

    With `stay` containerd is served, too. `ready` is called when the sockets answer. Raises
    FirstByteError if the daemon cannot start. At the end all its mounts and the sockets are gone,
    whatever happened.
    """
    places = Places(config.root, config.state)
    places.create()
    _raise_file_limit()
    with ExitStack() as held:
        await _take_lock(places, held)
        records = Records(places.records)
        await trio.to_thread.run_sync(detach_dead_mounts, places, records)
        await trio.to_thread.run_sync(lambda: places.mount.mkdir(mode=0o700, exist_ok=True))
        store = held.enter_context(LayerStore(places.root))
        async with Transport() as transport, open_nursery() as nursery:
            stop = trio.Event()
            nursery.start_soon(_stop_on_signal, stop)
            nursery.start_soon(keep_flushed, store)
            views = Views()
            await nursery.start(_serve_mount, views, places, stop)
            async with open_scheduler() as scheduler:
                locations = functools.cache(
                    functools.partial(_locations, transport, CredentialStore(), config)
                )
                images = Images(
                    places.root,
                    views,
                    records,
                    store,
                    scheduler,
                    locations,
                    nursery,
                    trusted=[Trust(way) for way in config.images.trust],
                )
                service = Service(places, images, records, nursery, stop=stop.set, stay=stay)
                try:
                    async with AsyncExitStack() as serving:
                        if stay:
                            service.containerd = await serving.enter_async_context(
                                serve_containerd(config, images)
                            )
                        await _answer_clients(places, service, stop, stay=stay, ready=ready)
                finally:
                    with trio.move_on_after(_CLOSE_SECONDS) as closing:
                        closing.shield = True
                        await service.close()
            nursery.cancel_scope.cancel()
    log.info("the daemon has ended")


def _locations(
    transport: Transport, credentials: CredentialStore, config: Config, plain_http: bool | None
) -> Locations:
    hosts = HostsTree(config.registry.config_path)
    return Locations(transport, credentials, hosts=hosts, plain_http=plain_http)


async def _answer_clients(
    places: Places, service: Service, stop: trio.Event, *, stay: bool, ready: Callable[[], None]
) -> None:
    """Take connections until `stop`, then end those that are left."""

    def idle() -> None:
        if service.idle and not stay:
            stop.set()

    connections = Connections(service, idle)
    async with open_nursery() as nursery:
        with _control_socket(places) as listener:
            accepting = trio.CancelScope()

            async def accept() -> None:
                with accepting:
                    await trio.serve_listeners(
                        connections.serve, [listener], handler_nursery=nursery
                    )

            nursery.start_soon(accept)
            log.info("ready: data in %s, control socket %s", places.root, places.socket)
            ready()
            if not stay:
                nursery.start_soon(_stop_unless_used, connections, stop)
            await stop.wait()
            log.info("ending")
            accepting.cancel()
        service.refuse()
        with trio.move_on_after(_DRAIN_SECONDS):
            await connections.drained()
        nursery.cancel_scope.cancel()


async def _serve_mount(
    views: Views, places: Places, stop: trio.Event, *, task_status: trio.TaskStatus[None]
) -> None:
    await session.serve(Operations(views), places.mount, task_status=task_status)
    log.error("somebody has unmounted %s: the daemon can serve no longer", places.mount)
    stop.set()


async def _stop_on_signal(stop: trio.Event) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async for number in signals:
            log.info("received %s", signal.Signals(number).name)
            stop.set()


async def _stop_unless_used(connections: Connections, stop: trio.Event) -> None:
    await trio.sleep(_FIRST_CLIENT_SECONDS)
    if not connections.total:
        stop.set()


async def _take_lock(places: Places, held: ExitStack) -> None:
    """Hold the state directory's lock until `held` ends. Raises DaemonError."""
    with trio.move_on_after(_LOCK_SECONDS):
        while True:
            attempt = ExitStack()
            if attempt.enter_context(locked(places.daemon_lock)):
                held.push(attempt)
                return
            attempt.close()
            if await _answers(places):
                break
            await trio.sleep(_LOCK_POLL_SECONDS)
    raise DaemonError(
        f"another daemon is running with the state directory {places.state}",
        hint="use that one, or give this one directories of its own with --state and --root",
    )


async def _answers(places: Places) -> bool:
    """Whether the daemon that has the lock is at work. One that is ending has no socket."""
    try:
        stream = await trio.open_unix_socket(places.socket)
    except OSError:
        return False
    await stream.aclose()
    return True


@contextmanager
def _control_socket(places: Places) -> Iterator[trio.SocketListener]:
    """Listen; at the end the socket is gone, and clients know that they have to start another."""
    listener = listen(places.socket)
    try:
        yield listener
    finally:
        listener.socket.close()
        places.socket.unlink(missing_ok=True)


def _raise_file_limit() -> None:
    """Each open layer takes two descriptors; images of a hundred layers are not rare."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
