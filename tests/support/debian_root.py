"""Root file systems of newer Debian suites, to run their programs in: containerd 2.1 and podman 5.8
from sid, podman 5.4 from trixie.

Each is made once on a machine and kept for later runs in `/var/cache/firstbyte-tests`, under a name
that tells its recipe: by `make test` beforehand, else by the first test that wants it. Nobody ever
writes to it: who enters it gets a mount namespace with an overlay above it, which is gone with the
namespace.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from snapshotter.mounts import syscalls
from snapshotter.mounts.table import read_mounts

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

Suite = Literal["sid", "trixie"]

_CACHE = Path("/var/cache/firstbyte-tests")

# Unpacking without configuring takes 5 s, a third of a whole installation, and is all that these
# programs need. coreutils and dash are for the tests' own commands.
_RECIPE = (
    "mmdebstrap",
    "--quiet",
    "--mode=root",
    "--variant=extract",
    '--aptopt=Acquire::Check-Valid-Until "false"',
    '--aptopt=Acquire::Retries "3"',
)
_PACKAGES: dict[Suite, str] = {
    "sid": "base-files,containerd,coreutils,dash,mount,podman,runc",
    "trixie": "base-files,coreutils,dash,mount,podman,runc",
}
_FILES = {
    # containerd copies both for pods in the host's network.
    "etc/hosts": "127.0.0.1 localhost\n",
    "etc/resolv.conf": "nameserver 127.0.0.1\n",
}

# "/" must be a mount point for runc, which a chroot is not. `mount` and `umount` are the host's
# until the root has changed.
_ENTER = """
set -e
root=$1 scratch=$2
shift 2
mount -t tmpfs tmpfs "$scratch"
mkdir "$scratch/upper" "$scratch/work" "$scratch/root"
mount -t overlay overlay \
    -o "lowerdir=$root,upperdir=$scratch/upper,workdir=$scratch/work" "$scratch/root"
cd "$scratch/root"
for place in proc sys dev; do mount --rbind "/$place" "$place"; done
mount -t tmpfs tmpfs run
for place; do mkdir -p ".$place"; mount --rbind "$place" ".$place"; done
mkdir run/host
pivot_root . run/host
umount -l /run/host
rmdir /run/host
echo entered
read -r _  # until whoever started this closes the pipe, or ends
"""


def debian_root(suite: Suite) -> Path:
    """The directory of a suite's root, which is made if this machine has none yet."""
    _CACHE.mkdir(mode=0o700, parents=True, exist_ok=True)
    recipe = repr((_RECIPE, _PACKAGES[suite], sorted(_FILES.items())))
    made = _CACHE / f"{suite}-{hashlib.sha256(recipe.encode()).hexdigest()[:12]}"
    with (_CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            unfinished = _CACHE / "unfinished"
            if unfinished.exists():  # of a run that was killed
                shutil.rmtree(unfinished)
            (unfinished / "scratch").mkdir(parents=True)
            _make(suite, unfinished / "root")
            unfinished.rename(made)
    return made


def _make(suite: Suite, root: Path) -> None:
    done = subprocess.run(
        [*_RECIPE, f"--include={_PACKAGES[suite]}", suite, root],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for name, text in _FILES.items():
        (root / name).write_text(text)


class EnteredRoot:
    """A mount namespace whose "/" is the Debian root; `pid` is a process that keeps it."""

    def __init__(self, pid: int) -> None:
        self.pid = pid

    @property
    def prefix(self) -> tuple[str, ...]:
        """What goes before a command to run it in there. The process is the command's own."""
        return ("nsenter", f"--mount=/proc/{self.pid}/ns/mnt", "--")

    def run(self, *command: str | Path) -> str:
        """What a command prints that must succeed."""
        done = subprocess.run(
            [*self.prefix, *command], capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout


@contextmanager
def entered(suite: Suite, binds: Sequence[Path] = ()) -> Iterator[EnteredRoot]:
    """Enter a suite's root with the directories `binds` of the host at the same places, `shared`.

    What programs in there mount stays in there.
    """
    made = debian_root(suite)
    with ExitStack() as stack:
        for directory in binds:
            stack.enter_context(shared(directory))
        process = stack.enter_context(
            subprocess.Popen(
                ["unshare", "--mount", "--propagation", "slave", "sh", "-c", _ENTER, "sh"]
                + [str(path) for path in (made / "root", made / "scratch", *binds)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
        stack.callback(process.kill)
        assert process.stdout
        assert process.stderr
        assert process.stdout.readline() == "entered\n", process.stderr.read()
        yield EnteredRoot(process.pid)


@contextmanager
def shared(directory: Path) -> Iterator[None]:
    """What is mounted below `directory` from now on appears where it is bound to, too.

    That is so for a directory on a shared mount. If it is not on one, it becomes one: a bind mount
    of itself, for as long as the block runs. At the end the mount goes, with all that was mounted
    on it meanwhile; so do this before, and end it after, what uses the directory.
    """
    if _is_shared(directory):
        yield
        return
    subprocess.run(["mount", "--rbind", directory, directory], check=True)
    try:
        subprocess.run(["mount", "--make-rshared", directory], check=True)
        yield
    finally:
        syscalls.unmount(directory, detach=True)


def _is_shared(directory: Path) -> bool:
    path = os.fsencode(directory)
    above = [
        entry
        for entry in read_mounts()
        if path == entry.point or path.startswith(entry.point.rstrip(b"/") + b"/")
    ]
    # Of the mounts on the way, the innermost; of those on top of each other, the last.
    innermost = max(enumerate(above), key=lambda item: (len(item[1].point), item[0]))[1]
    return any(field.startswith(b"shared:") for field in innermost.optional)


if __name__ == "__main__":
    for suite in get_args(Suite):
        debian_root(suite)
