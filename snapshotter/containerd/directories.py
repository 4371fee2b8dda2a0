"""The directories of snapshots: how they come to be as a whole, and how they are deleted.

`<root>/<id>/fs` is what a snapshot adds to those below it, `<root>/<id>/work` is overlay's. Names
that are no id are temporary: `new-*` is being made, `gone-*` is being deleted.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import threading
from typing import TYPE_CHECKING

import trio

from snapshotter.store.durable import make_directory, sync_directory
from snapshotter.store.errors import store_error

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator
    from pathlib import Path

log = logging.getLogger(__name__)

_NEW = "new-"
_GONE = "gone-"
_FS_MODE = 0o755  # containerd's, whatever the parent's: the root directory of every container
_WORK_MODE = 0o711


class Draft:
    """A snapshot's directory that is being made; it lasts only if it gets an id."""

    def __init__(self, root: Path, name: str) -> None:
        self._root = root
        self.name = name

    def fill(self, owner: tuple[int, int] | None, *, writable: bool) -> None:
        """Make what is in it, durably. Raises OSError."""
        path = self._root / self.name
        path.mkdir(mode=0o700)
        modes = {"fs": _FS_MODE, "work": _WORK_MODE} if writable else {"fs": _FS_MODE}
        for name, mode in modes.items():
            (path / name).mkdir()
            (path / name).chmod(mode)  # mkdir heeds the umask
        if owner is not None:
            os.chown(path / "fs", *owner)
        sync_directory(path / "fs")
        sync_directory(path)

    def settle(self, snapshot: int) -> None:
        """Give it its id; durable when this returns. Raises StoreError."""
        target = self._root / str(snapshot)
        try:
            (self._root / self.name).rename(target)
            self.name = target.name
            sync_directory(self._root)
        except OSError as error:
            raise store_error(error, target, "cannot create") from error


class Directories:
    """All of them. Thread-safe; methods wait for the disk."""

    def __init__(self, root: Path) -> None:
        """Raises StoreError."""
        make_directory(root)
        self._root = root
        self._lock = threading.Lock()
        self._busy: set[str] = set()  # temporary names that somebody works on
        self._stuck: set[str] = set()  # directories that cannot be deleted, and were logged

    def path(self, snapshot: int) -> Path:
        return self._root / str(snapshot)

    def layer(self, snapshot: int) -> Path:
        """Where the files of the snapshot are."""
        return self.path(snapshot) / "fs"

    @contextlib.contextmanager
    def draft(self, owner: tuple[int, int] | None, *, writable: bool) -> Iterator[Draft]:
        """A new directory, which is deleted again if the block is left by an exception.

        `owner` is the (uid, gid) of `fs`, ours if None; `writable` is for overlay's upper side.
        Raises StoreError.
        """
        with self._claim(_random(_NEW)) as name:
            draft = Draft(self._root, name)
            try:
                draft.fill(owner, writable=writable)
                yield draft
            except OSError as error:
                self.delete(draft.name)
                raise store_error(error, self._root / name, "cannot create") from error
            except BaseException:
                self.delete(draft.name)
                raise

    def names(self) -> set[str]:
        """Of all directories that nobody is making or deleting. Raises StoreError."""
        try:
            found = set(os.listdir(self._root))
        except OSError as error:
            raise store_error(error, self._root, "cannot list") from error
        # In this order: a name becomes busy before it is on the disk.
        with self._lock:
            return found - self._busy

    def missing(self, snapshots: Collection[int]) -> list[int]:
        """Those that have no files here."""
        return sorted(snapshot for snapshot in snapshots if not self.layer(snapshot).is_dir())

    def delete(self, name: str) -> bool:
        """Delete a tree, as far as possible; says whether it is gone, and logs once if not.

        Nothing outside of the tree is touched: symbolic links are not followed, and no mount is
        entered. For each directory that is found is moved to the top of the `gone-*` directory
        before it is looked into, and the kernel moves no mount point (EBUSY). That also keeps
        paths short and needs no recursion, however deep a container has nested directories.

        In trio's worker threads a cancelled caller is noticed between directories.
        """
        gone = name if name.startswith(_GONE) else _random(_GONE)
        with self._claim(gone):
            failure = self._empty(name, gone)
        if failure is not None and name not in self._stuck:
            self._stuck.update((name, gone))
            log.warning("cannot delete all of %s: %s", self._root / name, failure)
        return failure is None

    def _empty(self, name: str, gone: str) -> OSError | None:
        """Move `name` into `gone` unless that is it, and delete it; the first error."""
        top = self._root / gone
        try:
            if name != gone:
                top.mkdir(mode=0o700)
                with contextlib.suppress(FileNotFoundError):
                    (self._root / name).rename(top / "0")
            pending = os.listdir(top)
        except FileNotFoundError:
            return None
        except OSError as error:
            with contextlib.suppress(OSError):
                top.rmdir()
            return error
        failure: OSError | None = None
        while pending:
            _check_cancelled()
            found, problem = _remove_one(top, pending.pop())
            pending += found
            failure = failure or problem
        with contextlib.suppress(OSError):  # what is left in it was said to be
            top.rmdir()
        return failure

    @contextlib.contextmanager
    def _claim(self, name: str) -> Iterator[str]:
        with self._lock:
            self._busy.add(name)
        try:
            yield name
        finally:
            with self._lock:
                self._busy.discard(name)


def _random(prefix: str) -> str:
    return prefix + secrets.token_hex(8)


def _remove_one(top: Path, name: str) -> tuple[list[str], OSError | None]:
    """Delete a directory in `top`, those in it moved to `top`; their new names, the first error."""
    found: list[str] = []
    failure: OSError | None = None
    try:
        handle = os.open(top / name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except NotADirectoryError:  # a file or a link, which somebody put among the directories
        try:
            os.unlink(top / name)
        except OSError as error:
            failure = error
        return found, failure
    except OSError as error:
        return found, error
    try:
        with os.scandir(handle) as entries:
            for entry in entries:
                try:
                    if entry.is_dir(follow_symlinks=False):
                        moved = secrets.token_hex(8)
                        os.rename(entry.name, top / moved, src_dir_fd=handle)
                        found.append(moved)
                    else:
                        os.unlink(entry.name, dir_fd=handle)
                except OSError as error:
                    failure = failure or error
        os.rmdir(top / name)
    except OSError as error:
        failure = failure or error
    finally:
        os.close(handle)
    return found, failure


def _check_cancelled() -> None:
    with contextlib.suppress(RuntimeError):  # not in a thread of trio's
        trio.from_thread.check_cancelled()
