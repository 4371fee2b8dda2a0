"""What the daemon does when it is asked: mounts, takes down, tells.

Every system call that the kernel may hand on to our own FUSE mount (bind mounts, looking at mount
points) runs in a worker thread: the trio thread is the one that has to answer it.
"""

from __future__ import annotations

import logging
import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from index.errors import FirstByteError
from snapshotter.daemon import protocol
from snapshotter.daemon.errors import DaemonError
from snapshotter.daemon.mounts import Mount, MountState
from snapshotter.daemon.podman import PodmanImages
from snapshotter.daemon.records import MountRecord
from snapshotter.daemon.showing import Mode
from snapshotter.daemon.starts import is_named, start_record
from snapshotter.mounts import syscalls
from snapshotter.mounts.errors import MountBusyError, MountError, MountPointError
from snapshotter.mounts.mountpoint import check_mount_point
from snapshotter.mounts.table import mount_at, read_mounts

if TYPE_CHECKING:
    from collections.abc import Callable

    from snapshotter.daemon.containerd import Containerd
    from snapshotter.daemon.housekeeping import Housekeeping
    from snapshotter.daemon.images import Images
    from snapshotter.daemon.open_image import OpenImage
    from snapshotter.daemon.places import Places
    from snapshotter.daemon.podman_credentials import PodmanCredentials
    from snapshotter.daemon.podman_layers import PodmanLayers
    from snapshotter.daemon.process import Stop
    from snapshotter.daemon.records import Records
    from snapshotter.fetch.stats import FetchStats

log = logging.getLogger(__name__)

_LOCAL_POLL_SECONDS = 0.5  # between two progress lines of a client that waits for the whole image


class Service:
    """All mounts of this daemon, by directory. Does what control requests ask for."""

    def __init__(
        self,
        places: Places,
        images: Images,
        records: Records,
        nursery: trio.Nursery,
        housekeeping: Housekeeping,
        layers: PodmanLayers | None,
        credentials: PodmanCredentials,
        *,
        stop: Stop,
        stay: bool,
    ) -> None:
        """Without `stay` the daemon ends by itself when it is `idle`."""
        self._places = places
        self._images = images
        self._records = records
        self._nursery = nursery
        self._housekeeping = housekeeping
        self._stop = stop
        self._stay = stay
        self._mounts: dict[Path, Mount] = {}
        self._requests: set[trio.CancelScope] = set()
        self._refusing = False
        self._podman = PodmanImages(places.podman_images, images, layers, nursery)
        images.claims.append(self._podman.claimed)
        self._credentials = credentials
        self.containerd: Containerd | None = None
        """The snapshotter, if this daemon has one."""

    @property
    def idle(self) -> bool:
        return not self._mounts and self._podman.none and self._images.none_open

    async def handle(
        self, request: protocol.Request, report: Callable[[protocol.Progress], None]
    ) -> protocol.Reply:
        """Do one request. Raises FirstByteError."""
        scope = trio.CancelScope()
        self._requests.add(scope)
        try:
            with scope:
                if not self._refusing:
                    return await self._do(request, report)
        finally:
            self._requests.remove(scope)
        raise DaemonError("the daemon is ending")

    def refuse(self) -> None:
        """Interrupt the requests that are being done, and do no more."""
        self._refusing = True
        for scope in self._requests:
            scope.cancel()

    async def _do(
        self, request: protocol.Request, report: Callable[[protocol.Progress], None]
    ) -> protocol.Reply:
        await self._forget_vanished()
        match request:
            case protocol.MountRequest():
                return protocol.Mounted(_status_of(await self._mount(request, report)))
            case protocol.UmountRequest():
                return await self._umount(Path(request.target))
            case protocol.PodmanAddRequest():
                return protocol.PodmanAdded(await self._podman.add(request, report))
            case protocol.PodmanRemoveRequest():
                await self._podman.remove(request)
                return protocol.Unmounted(ending=self.idle and not self._stay)
            case protocol.PodmanCredentialsRequest():
                self._credentials.take(request)
                return protocol.CredentialsTaken()
            case protocol.StatusRequest():
                return await self.status()
            case protocol.CollectRequest():
                return await self._housekeeping.collect(
                    everything=request.everything, dry_run=request.dry_run
                )
            case protocol.DiskUsageRequest():
                return await self._housekeeping.usage(self._users())
            case protocol.WhyRequest():
                return start_record(self._named(request.name))
            case protocol.StopRequest():
                self._stop.take_down()
                return protocol.Unmounted(ending=True)
            case protocol.HandOverRequest():
                self._stop.leave()
                return protocol.Unmounted(ending=True)

    async def close(self) -> None:
        """Take down every mount, those in use too: their users get errors from now on."""
        for mount in list(self._mounts.values()):
            try:
                await self._take_down(mount)
            except MountBusyError as error:
                log.warning("%s; it is detached all the same, because the daemon ends", error)
                await self._take_down(mount, detach=True)
            except MountError as error:
                log.error("%s could not be unmounted: %s", mount.target, error)
        await self._podman.close()

    # --- mounting ---

    async def _mount(
        self, request: protocol.MountRequest, report: Callable[[protocol.Progress], None]
    ) -> Mount:
        wanted = _mode(request.mode)
        mount = await self._claim(Path(request.target), request.reference)
        try:
            mount.image, _ = await self._images.acquire(
                request.reference,
                request.platform,
                plain_http=request.plain_http,
                index=Path(request.index) if request.index else None,
                report=report,
            )
            if wanted is Mode.NATIVE:
                await self._wait_local(mount, report)
            await self._show(mount, wanted)
        except BaseException:
            with trio.CancelScope(shield=True):
                await self._drop(mount)
            raise
        if request.wait_local:
            await self._wait_local(mount, report)
        return mount

    async def _claim(self, target: Path, reference: str) -> Mount:
        """A mount that is PREPARING; nobody else can have its directory from now on."""
        if not target.is_absolute():
            raise MountPointError(f"{target} is not an absolute path")
        if target in self._mounts:
            raise MountPointError(
                f"{target} is {self._mounts[target].state.value} {self._mounts[target].reference}",
                hint="choose another directory",
            )
        mount = self._mounts[target] = Mount(target, reference)
        try:
            await trio.to_thread.run_sync(check_mount_point, target)
        except BaseException:
            del self._mounts[target]
            raise
        return mount

    async def _show(self, mount: Mount, wanted: Mode | None) -> None:
        """PREPARING to SERVING. Not interrupted in the middle: it is short and local."""
        image = mount.image
        assert image is not None
        with trio.CancelScope(shield=True):
            mount.mode, source = await self._images.directory(image, wanted)
            mount.why = image.shown.why if wanted is None else "asked for"
            record = MountRecord(
                target=str(mount.target),
                reference=mount.reference,
                digest=image.digest,
                mode=mount.mode.value,
            )
            await trio.to_thread.run_sync(self._records.add_mount, record)
            await trio.to_thread.run_sync(syscalls.bind, source, mount.target)
        self._serve(mount)

    def _serve(self, mount: Mount) -> None:
        mount.become(MountState.SERVING)
        self._nursery.start_soon(self._watch, mount)

    async def restore(self) -> None:
        """Take over the mounts of a predecessor, whose images are open again; and serve what is in
        podman's image store, after a reboot, too."""
        for record in self._records.mounts:
            target = Path(record.target)
            mounted = await trio.to_thread.run_sync(mount_at, target) is not None
            image = await self._restored(record) if mounted else None
            if image is None:
                await trio.to_thread.run_sync(self._records.remove_mount, record.target)
                if mounted:
                    log.error("%s cannot be served any more; it is detached", target)
                    await trio.to_thread.run_sync(partial(syscalls.unmount, target, detach=True))
                continue
            mount = self._mounts[target] = Mount(target, record.reference)
            mount.image, mount.mode = image, Mode(record.mode)
            self._serve(mount)
        try:
            await self._podman.restore()
        except FirstByteError as error:
            log.error("podman's image store cannot be served: %s", error)

    async def _restored(self, record: MountRecord) -> OpenImage | None:
        """The image of a mount, for one user more; None if it is gone."""
        try:
            return await self._images.open_known(record.digest)
        except FirstByteError as error:
            log.error("%s at %s: %s", record.reference, record.target, error)
            return None

    async def _watch(self, mount: Mount) -> None:
        """From SERVING on: has the background fill ended, or was some of it evicted again?"""
        image = mount.image
        assert image is not None
        with mount.watching:
            while not image.scope.cancel_called:
                settled, diminished = image.settled, image.diminished
                await settled.wait()
                if mount.state is MountState.SERVING:
                    if image.local:
                        mount.become(MountState.LOCAL)
                    elif image.quarantined:
                        mount.become(MountState.QUARANTINED)
                await diminished.wait()
                if mount.state is MountState.LOCAL:
                    mount.become(MountState.SERVING)

    async def _wait_local(self, mount: Mount, report: Callable[[protocol.Progress], None]) -> None:
        image = mount.image
        assert image is not None
        while not (image.settled.is_set() or mount.ended_serving.is_set()):
            fill = image.fill
            task = f"downloading ({fill.problem})" if fill.problem else "downloading"
            report(protocol.Progress(task, fill.done_bytes, fill.total_bytes))
            with trio.move_on_after(_LOCAL_POLL_SECONDS):
                await image.settled.wait()
        if image.view.refusal is not None:
            raise image.view.refusal
        if image.local and mount.state is not MountState.PREPARING:
            await mount.ended_serving.wait()  # `_watch` has been told, too
        if not image.local or mount.state is MountState.GONE:
            raise MountError(
                f"not all of {mount.reference} is local",
                hint=image.fill.problem or "it was unmounted",
            )

    # --- taking down ---

    async def _umount(self, target: Path) -> protocol.Unmounted:
        mount = self._mounts.get(target)
        if mount is None:
            raise MountPointError(
                f"no image is mounted at {target}", hint="firstbyte status lists what is mounted"
            )
        if mount.state is MountState.PREPARING:
            raise MountPointError(
                f"{mount.reference} is only being mounted at {target}",
                hint="interrupt the command that does",
            )
        await self._take_down(mount)
        return protocol.Unmounted(ending=self.idle and not self._stay)

    async def _take_down(self, mount: Mount, *, detach: bool = False) -> None:
        """Raises MountBusyError and changes nothing if a program uses the mount."""
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(lambda: syscalls.unmount(mount.target, detach=detach))
            await self._drop(mount)

    async def _drop(self, mount: Mount) -> None:
        """Forget a mount whose directory shows nothing of ours (any more); once."""
        if mount.state is MountState.GONE:  # somebody has noticed who is not done yet
            await mount.forgotten.wait()
            return
        mount.become(MountState.GONE)
        mount.watching.cancel()
        del self._mounts[mount.target]
        try:
            await trio.to_thread.run_sync(self._records.remove_mount, str(mount.target))
            if mount.image is not None:
                await self._images.release(mount.image)
        finally:
            mount.forgotten.set()

    async def _forget_vanished(self) -> None:
        """Somebody may have used umount(8) on our mounts: believe the mount table."""
        shown = [
            mount for mount in self._mounts.values() if mount.state is not MountState.PREPARING
        ]
        if not shown:
            return
        points = {entry.point for entry in await trio.to_thread.run_sync(read_mounts)}
        for mount in shown:
            if os.fsencode(mount.target) not in points:
                with trio.CancelScope(shield=True):
                    await self._drop(mount)

    # --- telling ---

    def _named(self, name: str) -> OpenImage:
        """The open image that somebody means. Raises DaemonError."""
        mount = self._mounts.get(Path(name))
        if mount is not None and mount.image is not None:
            return mount.image
        found = [image for image in self._images.all() if is_named(image, name)]
        if len(found) == 1:
            return found[0]
        shown = ", ".join(sorted(image.digest for image in found))
        raise DaemonError(
            f"{name} is {len(found)} images: {shown}" if found else f"no open image is {name}",
            hint="firstbyte status lists the images that are open",
        )

    def _users(self) -> dict[str, list[str]]:
        """Who uses images, by their digests."""
        users: dict[str, list[str]] = {}
        for mount in self._mounts.values():
            if mount.image is not None:
                users.setdefault(mount.image.digest, []).append(str(mount.target))
        for digest, name in self._podman.claimed().items():
            users.setdefault(digest, []).append(f"podman ({name})")
        if self.containerd is not None:
            for digest, count in self.containerd.snapshots().items():
                users.setdefault(digest, []).append(f"containerd ({count} snapshots)")
        return users

    async def status(self) -> protocol.Status:
        """What is mounted, and how everything is."""
        return protocol.Status(
            pid=os.getpid(),
            root=str(self._places.root),
            state=str(self._places.state),
            mounts=[_status_of(mount) for mount in self._mounts.values()],
            fetched=_fetched(self._images.stats),
            retries=self._images.stats.retries,
            damaged=self._images.stats.damaged,
            fuse_requests=self._images.fuse_requests,
            containerd=await self.containerd.status() if self.containerd else None,
            podman=self._podman.status(),
            store=self._housekeeping.status(),
        )


def _mode(text: str) -> Mode | None:
    """The mode of that name; None for the best there is. Raises MountError."""
    if text in ("", "auto"):
        return None
    try:
        return Mode(text)
    except ValueError:
        raise MountError(f"there is no mode {text!r}", hint="auto, native, erofs, fuse") from None


def _fetched(stats: FetchStats) -> dict[str, protocol.Fetched]:
    return {
        priority.name.lower(): protocol.Fetched(requests, stats.received_bytes[priority])
        for priority, requests in stats.requests.items()
    }


def _status_of(mount: Mount) -> protocol.MountStatus:
    image = mount.image
    return protocol.MountStatus(
        target=str(mount.target),
        reference=mount.reference,
        digest=image.digest if image else "",
        state=mount.state.value,
        mode=mount.mode.value if mount.mode else "",
        why=mount.why,
        local_bytes=image.fill.done_bytes if image else 0,
        total_bytes=image.fill.total_bytes if image else 0,
        problem=image.fill.problem if image else "",
    )
