"""Answers that are given at once: nothing is waited for, and nothing is written.

What is not answered here (None) is for pyfuse3, that is `operations`: requests that are rare, and
all about slots that no `View` has.

An inode number tells view and nid, and there are no handles. A process that takes the mount over
can therefore answer for inodes that it never gave out, and FORGET needs no bookkeeping. What is
remembered (`names`) only saves time.

Images never change, so every answer about them may be cached for ever, "no such name" too. Only
the mount's own root changes, as views come and go; it is never cached.
"""

from __future__ import annotations

import errno
import os
import stat
from typing import TYPE_CHECKING, TypeAlias

from index.erofs.reader import Inode
from snapshotter.fuse import wire
from snapshotter.fuse.handshake import InitFlag
from snapshotter.fuse.names import Names
from snapshotter.fuse.view import NID_BITS, NID_MASK, View, pack_inode
from snapshotter.fuse.wire import FOR_EVER, ROOT, Listing, Opcode, OpenFlag

if TYPE_CHECKING:
    from collections.abc import Callable

    from snapshotter.fuse.failures import FailureLog
    from snapshotter.fuse.handshake import InitRequest
    from snapshotter.fuse.view import Views

    Handler: TypeAlias = Callable[[int, int, memoryview], bytes | None]

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_TRUNC

# A listing may be asked for with a buffer of any size. Nobody else is served meanwhile: 64 KiB are
# some 350 entries, 1 ms.
_MAX_LISTING = 64 << 10

# Positions in a listing: 1 comes after ".", 2 after "..", then those of the image, moved up by 2.
AFTER_DOT = 1
AFTER_DOTS = 2

NO_REPLY = b""


class Answers:
    """For one session, which began with `request`."""

    def __init__(self, views: Views, failures: FailureLog, request: InitRequest) -> None:
        self._views = views
        self._failures = failures
        self._in_slot = views.in_slot
        self._names = Names()
        self._without_open = InitFlag.NO_OPEN_SUPPORT in request.flags
        self._without_opendir = InitFlag.NO_OPENDIR_SUPPORT in request.flags
        self._handlers: dict[int, Handler] = {
            Opcode.LOOKUP: self._lookup,
            Opcode.FORGET: self._forget,
            Opcode.BATCH_FORGET: self._forget,
            Opcode.GETATTR: self._getattr,
            Opcode.GETXATTR: self._getxattr,
            Opcode.OPEN: self._open,
            Opcode.RELEASE: self._release,
            Opcode.OPENDIR: self._opendir,
            Opcode.READDIRPLUS: self._readdirplus,
            Opcode.RELEASEDIR: self._release,
            Opcode.IOCTL: self._ioctl,
        }

    def answer(self, opcode: int, unique: int, nodeid: int, body: memoryview) -> bytes | None:
        """The reply, NO_REPLY, or None if this request is not for us. READ never is."""
        handler = self._handlers.get(opcode)
        if handler is None:
            return None
        try:
            return handler(unique, nodeid, body)
        except Exception as error:  # a mistake about one image; others must go on
            self._failures.note(Opcode(opcode).name.lower(), nodeid, error)
            return wire.error_reply(unique, errno.EIO)

    def view(self, nodeid: int) -> View | None:
        """The view that an inode is of; None if it is none of ours."""
        view = self._in_slot(nodeid >> NID_BITS)
        return view if view.__class__ is View else None

    def _lookup(self, unique: int, parent: int, body: memoryview) -> bytes | None:
        name = bytes(body[:-1])
        if parent == ROOT:
            return self._lookup_view(unique, name)
        view = self.view(parent)
        if view is None:
            return None
        image = view.image
        nid = self._names.lookup(image, parent, name)
        if nid is None:
            return wire.absent_reply(unique)
        number = pack_inode(view.slot, nid)
        return wire.entry_reply(unique, number, image.inode(nid), seconds=FOR_EVER)

    def _lookup_view(self, unique: int, name: bytes) -> bytes | None:
        """An image's root as an entry of the mount's: the name may go, the directory is fixed."""
        view = self._views.named(name)
        if view.__class__ is not View:
            return None
        image = view.image
        number = pack_inode(view.slot, image.root)
        return wire.entry_reply(unique, number, image.inode(image.root), seconds=0)

    def _getattr(self, unique: int, nodeid: int, body: memoryview) -> bytes | None:
        if nodeid == ROOT:
            return wire.attributes_reply(unique, ROOT, mount_root(self._views), seconds=0)
        view = self.view(nodeid)
        if view is None:
            return None
        inode = view.image.inode(nodeid & NID_MASK)
        return wire.attributes_reply(unique, nodeid, inode, seconds=FOR_EVER)

    def _getxattr(self, unique: int, nodeid: int, body: memoryview) -> bytes | None:
        """Only that there are none: overlayfs asks about every file, and few have any."""
        if nodeid != ROOT:
            view = self.view(nodeid)
            if view is None or view.image.has_xattrs(nodeid & NID_MASK):
                return None
        return wire.error_reply(unique, errno.ENODATA)

    def _open(self, unique: int, nodeid: int, body: memoryview) -> bytes:
        """The kernel stops asking, and caches for ever, if it is told that there is no such call.

        The mount is read-only, so it does not ask about opening for writing in the first place.
        """
        (flags,) = wire.OPEN_IN.unpack_from(body)
        if flags & _WRITING:
            return wire.error_reply(unique, errno.EROFS)
        if self._without_open:
            return wire.error_reply(unique, errno.ENOSYS)
        return wire.open_reply(unique, nodeid, OpenFlag.KEEP_CACHE)

    def _opendir(self, unique: int, nodeid: int, body: memoryview) -> bytes:
        if self._without_opendir:
            return wire.error_reply(unique, errno.ENOSYS)
        return wire.open_reply(unique, nodeid, OpenFlag.KEEP_CACHE | OpenFlag.CACHE_DIR)

    def _release(self, unique: int, nodeid: int, body: memoryview) -> bytes:
        return wire.error_reply(unique, 0)

    def _forget(self, unique: int, nodeid: int, body: memoryview) -> bytes:
        return NO_REPLY

    def _ioctl(self, unique: int, nodeid: int, body: memoryview) -> bytes:
        """None is known here. Python asks whether it is a terminal of each file that it opens."""
        return wire.error_reply(unique, errno.ENOTTY)

    def _readdirplus(self, unique: int, nodeid: int, body: memoryview) -> bytes | None:
        view = self.view(nodeid)
        if view is None:
            return None
        start, size = wire.READ_IN.unpack_from(body)
        listing = Listing(unique, min(size, _MAX_LISTING))
        _list(listing, view, nodeid & NID_MASK, start)
        return listing.reply()


def mount_root(views: Views) -> Inode:
    """The mount's root. The kernel believes a listing for as long as the time of change is this."""
    mode = stat.S_IFDIR | 0o755
    return Inode(ROOT, mode, 0, 0, 0, views.changed_ns, 2 + len(views), (0, 0))


def _list(listing: Listing, view: View, nid: int, start: int) -> None:
    """Fill a listing with a directory's entries from `start` on."""
    image, slot = view.image, view.slot
    if start < AFTER_DOT and not listing.add_name(
        b".", pack_inode(slot, nid), stat.S_IFDIR, AFTER_DOT
    ):
        return
    if start < AFTER_DOTS:
        parent = image.lookup(nid, b"..")
        number = pack_inode(slot, nid if parent is None else parent)
        if not listing.add_name(b"..", number, stat.S_IFDIR, AFTER_DOTS):
            return
    for place, name, child, _ in image.readdir(nid, max(start - AFTER_DOTS, 0)):
        number = pack_inode(slot, child)
        if not listing.add(name, number, image.inode(child), place + AFTER_DOTS):
            return
