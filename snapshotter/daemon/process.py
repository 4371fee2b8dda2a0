"""The daemon process: it takes over from one that was before, serves, and ends in one of two ways.

Either everything is unmounted, and nothing is left; or what is mounted stays for a successor, which
is what happens when the process is killed, too.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import importlib
import logging
import os
import resource
import signal
from contextlib import AsyncExitStack, ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import trio

from snapshotter.daemon import client, notify, protocol
from snapshotter.daemon.descriptors import descriptor_store
from snapshotter.daemon.errors import DaemonError
from snapshotter.daemon.handover import Inheritance, let_go_of_dying, opened_indexes
from snapshotter.daemon.housekeeping import Housekeeping
from snapshotter.daemon.images import Images
from snapshotter.daemon.knowledge import Knowledge
from snapshotter.daemon.places import Places, locked, locked_by
from snapshotter.daemon.podman_credentials import PodmanCredentials
from snapshotter.daemon.podman_layers import PodmanLayers, is_shown, show_layer_store
from snapshotter.daemon.records import Records
from snapshotter.daemon.server import Connections, listen
from snapshotter.daemon.service import Service
from snapshotter.daemon.showing import Mode
from snapshotter.fetch.scheduler import open_scheduler
from snapshotter.fuse import session
from snapshotter.fuse.operations import Operations
from snapshotter.fuse.view import Views
from snapshotter.images.discovery import Trust
from snapshotter.nursery import open_nursery
from snapshotter.registry.credentials import CredentialStore
from snapshotter.registry.handed import HandedCredentials
from snapshotter.registry.hosts_tree import HostsTree
from snapshotter.registry.locations import Locations
from snapshotter.registry.registries_conf import RegistriesConf
from snapshotter.registry.transport import Transport
from snapshotter.store.flusher import keep_flushed
from snapshotter.store.layers import LayerStore

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from snapshotter.daemon.config import Config
    from snapshotter.daemon.descriptors import DescriptorStore
    from snapshotter.fuse.session import Connection

log = logging.getLogger(__name__)

_M_ARENA_MAX = -8  # malloc.h
_LOCK_SECONDS = 15.0  # a predecessor that is ending may hold the lock for so long
_LOCK_POLL_SECONDS = 0.005  # readers wait meanwhile
_DRAIN_SECONDS = 5.0  # for interrupted requests to clean up, and their clients to be told
_CLOSE_SECONDS = 10.0  # for mounts to be taken down; what is left then, the kernel detaches
_FIRST_CLIENT_SECONDS = 60.0  # a daemon nobody talks to was started by somebody who gave up


class Stop:
    """Whether the daemon is to end, and what becomes of what it serves."""

    def __init__(self) -> None:
        self.requested = trio.Event()
        self.leaves = False
        """Everything stays mounted, for a successor; who reads waits for it."""

    def take_down(self) -> None:
        """End, and unmount everything."""
        self.requested.set()

    def leave(self) -> None:
        """End, and leave everything to a successor."""
        self.leaves = True
        self.requested.set()


async def run(
    config: Config, *, stay: bool, ready: Callable[[], None], replace: bool = False
) -> None:
    """Serve until told to stop; without `stay` only until nothing is mounted any more.

    With `stay` containerd is served, too. A daemon that ran before is succeeded: what it has left
    mounted goes on; with `replace` one that still runs is asked to end. `ready` is called when the
    sockets answer. Raises FirstByteError if the daemon cannot start.
    """
    places = Places(config.root, config.state)
    places.create()
    _raise_file_limit()
    _bound_arenas()
    if stay:  # gRPC takes 0.15 s to import, for which `firstbyte mount` need not wait
        importlib.import_module("snapshotter.daemon.containerd")
    gc.freeze()  # to look for cycles among what was imported takes 40 ms, and nobody is answered
    gc.enable()
    async with Transport() as transport:  # what takes a while comes before a predecessor leaves
        opened = await trio.to_thread.run_sync(opened_indexes, places) if replace else []
        with ExitStack() as held:
            if replace:
                request = protocol.HandOverRequest()
                ask = functools.partial(client.ask, places, request, start=None)
                await trio.to_thread.run_sync(ask, abandon_on_cancel=True)
            kept = descriptor_store(places.state)
            await _take_lock(places, held, kept)
            records = Records(places.records)
            inheritance = await trio.to_thread.run_sync(Inheritance, places, kept, records)
            connection, resumed = await trio.to_thread.run_sync(inheritance.mount)
            stop = Stop()
            stop.leaves = resumed  # if this start fails, somebody else may do better
            try:
                store = held.enter_context(LayerStore(places.root, config.store.bounds))
                knowledge = Knowledge(places.root, opened)
                parts = _Parts(
                    config, places, records, inheritance, connection, store, knowledge, transport
                )
                async with open_nursery() as nursery:
                    nursery.start_soon(_stop_on_signal, stop)
                    nursery.start_soon(keep_flushed, store)
                    await _serve(parts, nursery, stop, resumed=resumed, stay=stay, ready=ready)
                    nursery.cancel_scope.cancel()
            finally:
                if stop.leaves:
                    session.leave(connection)
                else:
                    with trio.CancelScope(shield=True):
                        await trio.to_thread.run_sync(inheritance.unmount, connection)
    log.info("the daemon has ended%s", "; its mounts wait for another" if stop.leaves else "")


@dataclass(frozen=True)
class _Parts:
    """What a daemon is made of, before it serves."""

    config: Config
    places: Places
    records: Records
    inheritance: Inheritance
    connection: Connection
    store: LayerStore
    knowledge: Knowledge
    transport: Transport


async def _serve(
    parts: _Parts,
    nursery: trio.Nursery,
    stop: Stop,
    *,
    resumed: bool,
    stay: bool,
    ready: Callable[[], None],
) -> None:
    """Answer kernel, containerd and clients until `stop`."""
    config, places = parts.config, parts.places
    views = Views()
    handed = HandedCredentials()
    nursery.start_soon(handed.forget_in_time)
    locations = functools.cache(
        functools.partial(_locations, parts.transport, CredentialStore(handed=handed), config)
    )
    # The kernel is answered by the inner one, which ends first: a read that still waits when the
    # scheduler closes would fail, instead of waiting for the successor.
    async with open_scheduler() as scheduler, open_nursery() as answering:
        images = Images(
            places,
            views,
            parts.records,
            parts.store,
            parts.knowledge,
            scheduler,
            locations,
            nursery,
            trusted=[Trust(way) for way in config.images.trust],
            mode=None if config.mounts.mode == "auto" else Mode(config.mounts.mode),
        )
        housekeeping = Housekeeping(parts.store, images)
        await images.restore()  # before the kernel asks for any of them
        layers = None
        if stay or await trio.to_thread.run_sync(is_shown, places):
            may_build = config.images.build
            layers = PodmanLayers(places, views, images, nursery, may_build=may_build)
            await layers.restore(resumed=resumed)
        await answering.start(_serve_mount, views, parts.connection, places, resumed, stop)
        if not resumed:
            await trio.to_thread.run_sync(parts.records.serve, parts.connection.init)
        await images.settle()
        images.fill_restored()
        nursery.start_soon(images.keep_small)
        service = Service(
            places,
            images,
            parts.records,
            nursery,
            housekeeping,
            layers,
            PodmanCredentials(handed, layers),
            stop=stop,
            stay=stay,
        )
        await service.restore()
        stop.leaves = False
        try:
            async with AsyncExitStack() as serving:
                if layers is not None:
                    await serving.enter_async_context(show_layer_store(layers, places, stop))
                if stay:
                    from snapshotter.daemon.containerd import serve_containerd  # `run` has

                    service.containerd = await serving.enter_async_context(
                        serve_containerd(config, images, parts.inheritance, stop)
                    )
                else:
                    await images.close_unused()
                nursery.start_soon(housekeeping.run)
                if config.metrics.address:
                    from snapshotter.daemon.metrics import serve_metrics  # 0.1 s

                    await nursery.start(
                        serve_metrics, config.metrics.address, service.status, images.stats
                    )
                nursery.start_soon(notify.beat, functools.partial(_sign_of_life, places))
                async with open_nursery() as preparing:  # which asks the mount, so it ends first
                    if stay:
                        preparing.start_soon(images.prepare)
                    await _answer_clients(places, service, stop, stay=stay, ready=ready)
                if images.none_open:
                    stop.leaves = False  # nothing is mounted that somebody could want
        finally:
            with trio.move_on_after(_CLOSE_SECONDS) as closing:
                closing.shield = True
                if stop.leaves:
                    await trio.to_thread.run_sync(parts.store.flush)  # while reads are answered
                else:
                    await service.close()
        answering.cancel_scope.cancel()


async def _sign_of_life(places: Places) -> None:
    """Return if trio and the FUSE mount are at work."""
    await trio.to_thread.run_sync(os.stat, places.mount, abandon_on_cancel=True)


def _locations(
    transport: Transport, credentials: CredentialStore, config: Config, plain_http: bool | None
) -> Locations:
    registry = config.registry
    hosts = HostsTree(registry.config_path, RegistriesConf(registry.registries_conf))
    return Locations(transport, credentials, hosts=hosts, plain_http=plain_http)


async def _answer_clients(
    places: Places, service: Service, stop: Stop, *, stay: bool, ready: Callable[[], None]
) -> None:
    """Take connections until `stop`, then end those that are left."""

    def idle() -> None:
        if service.idle and not stay:
            stop.take_down()

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
            notify.notify(notify.READY)
            if not stay:
                nursery.start_soon(_stop_unless_used, connections, service, stop)
            await stop.requested.wait()
            log.info("ending")
            notify.notify(notify.STOPPING)
            accepting.cancel()
        service.refuse()
        with trio.move_on_after(_DRAIN_SECONDS):
            await connections.drained()
        nursery.cancel_scope.cancel()


async def _serve_mount(
    views: Views,
    connection: Connection,
    places: Places,
    resumed: bool,
    stop: Stop,
    *,
    task_status: trio.TaskStatus[None],
) -> None:
    operations = Operations(views)
    await session.serve(
        operations, connection, places.mount, resumed=resumed, task_status=task_status
    )
    log.error("somebody has unmounted %s: the daemon can serve no longer", places.mount)
    stop.take_down()


async def _stop_on_signal(stop: Stop) -> None:
    """SIGINT is a person who wants to be rid of it; SIGTERM a service manager, who will want it
    back: an upgrade, or a restart."""
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async for number in signals:
            log.info("received %s", signal.Signals(number).name)
            if number == signal.SIGTERM:
                stop.leave()
            else:
                stop.take_down()


async def _stop_unless_used(connections: Connections, service: Service, stop: Stop) -> None:
    await trio.sleep(_FIRST_CLIENT_SECONDS)
    if not connections.total and service.idle:
        stop.take_down()


async def _take_lock(places: Places, held: ExitStack, kept: DescriptorStore) -> None:
    """Hold the state directory's lock until `held` ends. Raises DaemonError."""
    with trio.move_on_after(_LOCK_SECONDS):
        while True:
            attempt = ExitStack()
            if attempt.enter_context(locked(places.daemon_lock)):
                held.push(attempt)
                return
            attempt.close()
            pid = locked_by(places.daemon_lock)
            dying = await trio.to_thread.run_sync(let_go_of_dying, pid, kept)
            if not dying and await _answers(places):
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


def _bound_arenas() -> None:
    """Threads share two heaps: by itself glibc makes eight for each core, and what one has given
    back does not serve the others. After storms of 30 containers that was 67 of 140 MB."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none, nor such heaps
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, 2)
