"""pyfuse3's handlers: answers to what the relay passes on, and to nothing else.

    LOOKUP                 of a name in the mount's root that is no image's; in a live view
    GETATTR, READ          of what is in a live view
    READDIRPLUS            of the mount's root, and in a live view
    READLINK, LISTXATTR    of everything, and GETXATTR of what has any
    STATFS                 of the mount
    CREATE, MKNOD, RMDIR   where the mount is bound to be written to: an error, but in a live view,
                           where `notices` has them
    any of these           about a slot that is gone: ESTALE

`answers` and `reads` have the rest, and there it says what may be remembered and why. Handles are
inode numbers here.
"""

from __future__ import annotations

import errno
import os
import stat
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar, cast

import pyfuse3

from index.errors import FirstByteError
from snapshotter.fuse.answers import AFTER_DOT, AFTER_DOTS
from snapshotter.fuse.failures import FailureLog
from snapshotter.fuse.live import LiveView
from snapshotter.fuse.view import pack_inode, unpack_inode

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator, Sequence

    from snapshotter.fuse.view import View, Views

_FOR_EVER = float("inf")  # libfuse and the kernel cut it to what they can count
_SECTOR = 512  # the unit of st_blocks, whatever a file system's blocks are
_BLOCK = 4096  # the unit of statfs, and the preferred size of small reads
_NAME_MAX = 255

_P = ParamSpec("_P")
_R = TypeVar("_R")


def _answered(
    handler: Callable[Concatenate[Operations, int, _P], Coroutine[Any, Any, _R]],
) -> Callable[Concatenate[Operations, int, _P], Coroutine[Any, Any, _R]]:
    """Let nothing but FUSEError out of a handler: pyfuse3 would end the session."""

    async def guarded(self: Operations, inode: int, /, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            return await handler(self, inode, *args, **kwargs)
        except pyfuse3.FUSEError:
            raise
        except Exception as error:
            raise self.refuse(handler.__name__, inode, error) from error

    return guarded


class Operations(pyfuse3.Operations):
    """The handlers that pyfuse3 calls, one a request; all others answer ENOSYS by default."""

    supports_dot_lookup = False
    enable_writeback_cache = False
    enable_acl = True  # the kernel enforces POSIX access lists, as on the file system of an unpack

    def __init__(self, views: Views) -> None:
        super().__init__()
        self.views = views
        self.failures = FailureLog(views)

    def refuse(self, what: str, inode: int, error: Exception) -> pyfuse3.FUSEError:
        """Log why a request about `inode` failed; returns what to raise."""
        self.failures.note(what, inode, error)
        return pyfuse3.FUSEError(errno.EIO)

    def _find(self, inode: int) -> tuple[View, int]:
        slot, nid = unpack_inode(inode)
        view = self.views.in_slot(slot)
        if view is None:  # unmounted, but the kernel remembers
            raise pyfuse3.FUSEError(errno.ESTALE)
        if isinstance(view, LiveView) and not view.knows(nid):
            raise pyfuse3.FUSEError(errno.ESTALE)
        return view, nid

    def _find_live(self, inode: int) -> tuple[LiveView, int]:
        view, nid = self._find(inode)
        assert isinstance(view, LiveView)
        return view, nid

    @_answered
    async def lookup(
        self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        if parent_inode == pyfuse3.ROOT_INODE:
            named = self.views.named(name)
            if named is None:
                raise pyfuse3.FUSEError(errno.ENOENT)
            return _view_root(named)
        view, parent = self._find_live(parent_inode)
        found = await view.find(parent, name)
        if found is None:
            raise pyfuse3.FUSEError(errno.ENOENT)
        return _passing(*found)

    @_answered
    async def getattr(self, inode: int, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        return _attributes(*self._find(inode))

    @_answered
    async def readlink(self, inode: int, ctx: pyfuse3.RequestContext) -> bytes:
        view, nid = self._find(inode)
        return view.image.readlink(nid)

    @_answered
    async def read(self, fh: int, off: int, size: int) -> bytes:
        view, nid = self._find_live(fh)
        try:
            data = await view.read(nid, off, size)
        except FirstByteError as error:
            raise self.refuse(f"read of {size} bytes at {off}", fh, error) from error
        return cast("bytes", data)  # pyfuse3 takes any buffer, whatever its annotation says

    @_answered
    async def create(
        self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: pyfuse3.RequestContext
    ) -> tuple[pyfuse3.FileInfo, pyfuse3.EntryAttributes]:
        raise self._refuse_change(parent_inode)

    @_answered
    async def mknod(
        self, parent_inode: int, name: bytes, mode: int, rdev: int, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        raise self._refuse_change(parent_inode)

    @_answered
    async def rmdir(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        raise self._refuse_change(parent_inode)

    def _refuse_change(self, parent: int) -> pyfuse3.FUSEError:
        if parent != pyfuse3.ROOT_INODE:
            self._find(parent)
        return pyfuse3.FUSEError(errno.EROFS)

    @_answered
    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        listing = (
            _list_mount_root(self.views, start_id)
            if fh == pyfuse3.ROOT_INODE
            else _list_directory(*self._find_live(fh), start_id)
        )
        for position, name, attributes in listing:
            if not pyfuse3.readdir_reply(token, name, attributes, position):
                break

    @_answered
    async def getxattr(self, inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> bytes:
        view, nid = self._find(inode)
        value = view.image.xattrs(nid).get(name)
        if value is None:
            raise pyfuse3.FUSEError(errno.ENODATA)
        return value

    @_answered
    async def listxattr(self, inode: int, ctx: pyfuse3.RequestContext) -> Sequence[bytes]:
        if inode == pyfuse3.ROOT_INODE:
            return ()
        view, nid = self._find(inode)
        return tuple(view.image.xattrs(nid))

    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        """The sum over all views: the kernel asks for the mount and does not say which file."""
        data = pyfuse3.StatvfsData()
        data.f_bsize = data.f_frsize = _BLOCK
        data.f_blocks = sum(-(-view.raw_size // _BLOCK) for view in self.views)
        data.f_files = sum(view.image.inode_count for view in self.views)
        data.f_bfree = data.f_bavail = data.f_ffree = data.f_favail = 0
        data.f_namemax = _NAME_MAX
        return data


def _attributes(view: View, nid: int) -> pyfuse3.EntryAttributes:
    inode = view.image.inode(nid)
    attributes = pyfuse3.EntryAttributes()
    attributes.st_ino = pack_inode(view.slot, nid)
    remembered = 0 if isinstance(view, LiveView) else _FOR_EVER
    attributes.entry_timeout = attributes.attr_timeout = remembered
    attributes.st_mode = inode.mode
    attributes.st_nlink = inode.nlink
    attributes.st_uid = inode.uid
    attributes.st_gid = inode.gid
    attributes.st_rdev = os.makedev(*inode.rdev)
    attributes.st_size = inode.size
    attributes.st_blksize = _BLOCK
    attributes.st_blocks = -(-inode.size // _SECTOR)
    attributes.st_mtime_ns = attributes.st_ctime_ns = attributes.st_atime_ns = inode.mtime_ns
    return attributes


def _passing(view: View, nid: int) -> pyfuse3.EntryAttributes:
    """What a name stands for that may go."""
    attributes = _attributes(view, nid)
    attributes.entry_timeout = 0
    return attributes


def _view_root(view: View) -> pyfuse3.EntryAttributes:
    """An image's root as an entry of the mount's root: the name may go, the directory is fixed."""
    return _passing(view, view.image.root)


def _mount_root(views: Views) -> pyfuse3.EntryAttributes:
    attributes = pyfuse3.EntryAttributes()
    attributes.st_ino = pyfuse3.ROOT_INODE
    attributes.entry_timeout = attributes.attr_timeout = 0
    attributes.st_mode = stat.S_IFDIR | 0o755
    attributes.st_nlink = 2 + len(views)
    return attributes


def _list_directory(
    view: LiveView, nid: int, start: int
) -> Iterator[tuple[int, bytes, pyfuse3.EntryAttributes]]:
    """(position after it, name, attributes) of each entry from `start` on.

    The kernel takes only number and type of "." and "..", and counts no reference to them.
    """
    if start < AFTER_DOT:
        yield AFTER_DOT, b".", _attributes(view, nid)
    if start < AFTER_DOTS:
        parent = view.image.lookup(nid, b"..")
        yield AFTER_DOTS, b"..", _attributes(view, nid if parent is None else parent)
    done = max(start - AFTER_DOTS, 0)
    for position, (name, of, child) in enumerate(list(view.entries(nid))[done:], start=done):
        yield position + 1 + AFTER_DOTS, name, _passing(of, child)


def _list_mount_root(
    views: Views, start: int
) -> Iterator[tuple[int, bytes, pyfuse3.EntryAttributes]]:
    """The same for the views; their position is their slot, so views may come and go meanwhile."""
    if start < AFTER_DOT:
        yield AFTER_DOT, b".", _mount_root(views)
    if start < AFTER_DOTS:
        yield AFTER_DOTS, b"..", _mount_root(views)
    for view in views.after(start - AFTER_DOTS):
        yield view.slot + AFTER_DOTS, view.name, _view_root(view)
