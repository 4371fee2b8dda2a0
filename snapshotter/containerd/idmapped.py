"""Lower directories as containers in user namespaces have them: through idmapped mounts of ours.

Labels of a snapshot say how its container's ids are mapped. containerd would do it if it was
answered the options `uidmap` and `gidmap`, but it maps a copy of the directory that all lower
directories have in common, and mounts in there are not part of the copy: lazy images are missing.
So each is mapped by itself here, at `<folder>/<snapshot>/<number>`, for as long as the snapshot has
mounts to be asked for. An overlay takes a copy of its own and does not need them any more.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING

from index.errors import FirstByteError
from snapshotter.containerd.errors import FailedPreconditionError, UnavailableError
from snapshotter.containerd.overlay import check_path, root_of
from snapshotter.mounts import syscalls
from snapshotter.mounts.errors import MountError, MountPointError
from snapshotter.mounts.idmap import clone_idmapped, user_namespace

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from snapshotter.mounts.idmap import IdMapping

log = logging.getLogger(__name__)


class Draft:
    """Mapped copies of lower directories that nobody sees yet; they last if they get a snapshot.

    `lowers` are where the directories are seen; `trees` are the copies of them, by number.
    """

    def __init__(self, folder: Path, lowers: Sequence[Path], trees: dict[int, int]) -> None:
        self._folder = folder
        self._trees = trees
        self.lowers = list(lowers)
        self.place: Path | None = None

    def settle(self, snapshot: int) -> None:
        """Show the copies. Raises UnavailableError."""
        self.place = self._folder / str(snapshot)
        try:
            for number, tree in self._trees.items():
                point = self.lowers[number] = self.place / str(number)
                point.mkdir(mode=0o700, parents=True)
                syscalls.attach(tree, point)
        except (MountError, OSError) as error:
            raise UnavailableError(f"cannot show layers with mapped ids: {error}") from error


class IdmappedDirectories:
    """Those of all snapshots whose labels map ids. Thread-safe; methods wait for the kernel."""

    def __init__(self, folder: Path) -> None:
        """`folder` is made when it is needed, and should not survive a reboot."""
        self._folder = folder
        self._changing = threading.Lock()

    @contextmanager
    def draft(self, lowers: Sequence[Path], mapping: IdMapping | None) -> Iterator[Draft]:
        """Copies of `lowers`, which are gone again if the block is left by an exception.

        Without a mapping there are none. Raises UnavailableError, and FailedPreconditionError if
        this kernel cannot map ids of a directory.
        """
        with ExitStack() as stack:
            draft = Draft(self._folder, lowers, _clone(lowers, mapping, self._folder, stack))
            try:
                yield draft
            except BaseException:
                if draft.place is not None:
                    _remove(draft.place)
                raise

    def lowers(
        self, snapshot: int, lowers: Sequence[Path], mapping: IdMapping | None
    ) -> Sequence[Path]:
        """Where a snapshot's directories are seen. What is not there is shown again.

        That is after a reboot, and when a directory is at another place by now. Raises as `draft`.
        """
        if mapping is None:
            return lowers
        place = self._folder / str(snapshot)
        with self._changing:
            shown = list(lowers)
            for number in _to_map(lowers, mapping):
                shown[number] = place / str(number)
            if not all(map(_same, shown, lowers)):
                _remove(place)
                with self.draft(lowers, mapping) as draft:
                    draft.settle(snapshot)
                    return draft.lowers
            return shown

    def names(self) -> set[str]:
        """Of the snapshots that have something here."""
        try:
            return set(os.listdir(self._folder))
        except FileNotFoundError:
            return set()

    def remove(self, name: str) -> None:
        """Show nothing for this snapshot any more; containers that run go on."""
        with self._changing:
            _remove(self._folder / name)

    def close(self) -> None:
        """Show nothing any more."""
        for name in self.names():
            self.remove(name)


def _clone(
    lowers: Sequence[Path], mapping: IdMapping | None, folder: Path, stack: ExitStack
) -> dict[int, int]:
    """Detached mapped copies of those directories that need it, by number, while `stack` lasts."""
    trees: dict[int, int] = {}
    if mapping is None or not (numbers := _to_map(lowers, mapping)):
        return trees
    try:
        check_path(folder)
        with user_namespace(mapping) as namespace:
            for number in numbers:
                trees[number] = clone_idmapped(lowers[number], namespace)
                stack.callback(os.close, trees[number])
    except FirstByteError as error:
        if isinstance(error, MountError) and error.errno == errno.EINVAL:
            raise FailedPreconditionError(
                f"a container in a user namespace cannot have this image: {error.message}",
                hint="take remap-ids out of the capabilities in containerd's configuration",
            ) from error
        raise UnavailableError(error.message, hint=error.hint) from error
    return trees


def _to_map(lowers: Sequence[Path], mapping: IdMapping) -> list[int]:
    """The numbers of the directories whose owners are to be mapped.

    Not of one that is the container's: without the capability remap-ids, containerd bases the
    snapshot on a copy that has the container's owners, and still gives it the labels.
    """
    theirs = root_of(mapping)
    try:
        status = [lower.stat() for lower in lowers]
    except OSError as error:
        raise UnavailableError(f"cannot look at {error.filename}: {error.strerror}") from error
    owners = [(each.st_uid, each.st_gid) for each in status]
    return [number for number, owner in enumerate(owners) if owner != theirs or owner == (0, 0)]


def _same(shown: Path, lower: Path) -> bool:
    try:
        return shown.samefile(lower)
    except OSError:  # not there, or its server is dead
        return False


def _remove(place: Path) -> None:
    try:
        points = list(place.iterdir())
    except FileNotFoundError:
        return
    try:
        for point in points:
            with suppress(MountPointError):  # nothing is mounted there any more
                while True:
                    syscalls.unmount(point, detach=True)
            point.rmdir()
        place.rmdir()
    except (MountError, OSError) as error:
        log.warning("%s is left: %s", place, error)
