"""`make install`: what is put where, that it works there, and that it goes again.

The units run under a real systemd, with the programs that were installed.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tomllib
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support import tars
from tests.support.instance import wait_until
from tests.support.layouts import write_layout
from tests.support.systemd import Systemd, systemd

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

REPOSITORY = Path(__file__).parents[2]
UNITS = REPOSITORY / "systemd"
SECONDS = 240

EXPOSURE = 50
"""Tenths of what `systemd-analyze security` says. Most of it is that the daemon is root, has the
network, and mounts for others."""

PRIVATE_MOUNTS = (
    "BindPaths|BindReadOnlyPaths|DynamicUser|ExecPaths|ExtensionImages|InaccessiblePaths|LogNamespace|"
    "MountFlags|MountImages|NoExecPaths|PrivateDevices|PrivateIPC|PrivateMounts|PrivateTmp|ProcSubset|"
    "ProtectControlGroups|ProtectHome|ProtectKernelLogs|ProtectKernelModules|ProtectKernelTunables|"
    "ProtectProc|ProtectSystem|ReadOnlyPaths|ReadWritePaths|RootDirectory|RootImage|"
    "TemporaryFileSystem"
)
"""Each gives a service a mount namespace of its own (systemd.exec(5))."""


def script(name: str, dest: Path, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [REPOSITORY / "scripts" / name],
        env=dict(os.environ, DESTDIR=str(dest), **more),
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )


def succeed(name: str, dest: Path, **more: str) -> str:
    done = script(name, dest, **more)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return done.stdout


def found(dest: Path) -> set[str]:
    """All files but those of the program."""
    files = (path for path in dest.rglob("*") if path.is_symlink() or not path.is_dir())
    names = {str(path.relative_to(dest)) for path in files}
    return {name for name in names if "/venv-" not in name}


@pytest.fixture(scope="module", autouse=True)
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What installations are made from is fetched once, and not by each of them."""
    path = tmp_path_factory.mktemp("wheels")
    backend = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["build-system"]["requires"]
    fetch = [REPOSITORY / ".venv/bin/python", "-m", "pip", "wheel", "--quiet", "--wheel-dir", path]
    subprocess.run([*fetch, *backend, REPOSITORY], timeout=SECONDS, check=True)
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("PIP_NO_INDEX", "1")
        patched.setenv("PIP_FIND_LINKS", str(path))
        yield


@pytest.fixture(scope="module")
def dest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An installation that tests leave as it is."""
    path = tmp_path_factory.mktemp("dest")
    succeed("install", path)
    return path


# --- what is put where ---


def test_everything_is_where_it_is_looked_for(dest: Path) -> None:
    share = "usr/local/share"
    pages = {f"docs/{page.name}" for page in (REPOSITORY / "docs").glob("*.md")}
    pages |= {"README.md", "CHANGELOG.md", "LICENSE", "config.toml"}
    assert found(dest) == {
        "etc/firstbyte/config.toml",
        "usr/local/bin/firstbyte",
        "usr/local/bin/firstbyte-podman-credentials",
        "usr/local/lib/firstbyte/installed",
        "usr/local/lib/systemd/system/firstbyte.service",
        "usr/local/lib/systemd/system/firstbyte.socket",
        "usr/local/lib/systemd/user/firstbyte.service",
        "usr/local/lib/tmpfiles.d/firstbyte.conf",
        f"{share}/bash-completion/completions/firstbyte",
        f"{share}/fish/vendor_completions.d/firstbyte.fish",
        f"{share}/zsh/site-functions/_firstbyte",
        *(f"{share}/doc/firstbyte/{page}" for page in pages),
    }


def test_nothing_names_the_place_where_it_was_made(dest: Path) -> None:
    names = subprocess.run(
        ["grep", "-rl", "--fixed-strings", str(dest), dest], capture_output=True, check=False
    )
    assert not names.stdout


def test_everybody_can_run_it_and_only_its_owner_can_change_it(dest: Path) -> None:
    for path in dest.rglob("*"):
        mode = path.lstat().st_mode
        if not path.is_symlink():
            assert mode & 0o044 == 0o044, path
            assert not mode & 0o022, path


def test_completion_of_commands(dest: Path) -> None:
    """With the command that was installed, by name, as a shell finds it."""
    share = dest / "usr/local/share"
    program = '. "$1"; COMP_WORDS=(firstbyte stat) COMP_CWORD=1'
    program += '; _firstbyte_completion firstbyte; echo "$COMPREPLY"'
    done = subprocess.run(
        ["bash", "-c", program, "-", share / "bash-completion/completions/firstbyte"],
        env=dict(os.environ, PATH=f"{REPOSITORY}/.venv/bin:{os.environ['PATH']}"),
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=True,
    )
    assert done.stdout == "status\n"
    zsh = (share / "zsh/site-functions/_firstbyte").read_text()
    assert zsh.startswith("#compdef firstbyte\n")
    fish = (share / "fish/vendor_completions.d/firstbyte.fish").read_text()
    assert "complete --no-files --command firstbyte" in fish


def test_another_prefix(tmp_path: Path) -> None:
    succeed("install", tmp_path, PREFIX="/opt/firstbyte")
    unit = (tmp_path / "etc/systemd/system/firstbyte.service").read_text()
    assert "\nExecStart=/opt/firstbyte/bin/firstbyte daemon --replace\n" in unit
    assert "/usr/local" not in unit
    assert (tmp_path / "etc/tmpfiles.d/firstbyte.conf").exists()
    assert (tmp_path / "opt/firstbyte/bin/firstbyte").is_file()
    succeed("uninstall", tmp_path, PREFIX="/opt/firstbyte")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("prefix", ["usr/local", "/usr/lo cal", "/", "/usr|x"])
def test_prefixes_that_cannot_be(tmp_path: Path, prefix: str) -> None:
    done = script("install", tmp_path, PREFIX=prefix)
    assert done.returncode == 1
    assert done.stderr.startswith("install: PREFIX must be an absolute path")
    assert list(tmp_path.iterdir()) == []


# --- upgrade and removal ---


def test_an_upgrade_leaves_the_running_program_and_what_was_edited(
    dest: Path, tmp_path: Path
) -> None:
    """A copy is upgraded; what only the earlier version had is gone afterwards."""
    copy = tmp_path / "copy"
    shutil.copytree(dest, copy, symlinks=True)
    lib, config = copy / "usr/local/lib/firstbyte", copy / "etc/firstbyte/config.toml"
    old_page = copy / "usr/local/share/doc/firstbyte/old.md"
    old_page.touch()
    with (lib / "installed").open("a") as listed:
        listed.write("file /usr/local/share/doc/firstbyte/old.md\n")
    edited = config.read_text() + "[images]\nbuild = false\n"
    config.write_text(edited)

    assert "stays as you have edited it" in succeed("install", copy)
    assert os.readlink(copy / "usr/local/bin/firstbyte").startswith("../lib/firstbyte/venv-2/")
    assert (lib / "venv-1/bin/firstbyte").exists()
    assert config.read_text() == edited
    assert not old_page.exists()
    assert found(copy) == found(dest)

    (lib / "of somebody else").touch()
    assert "config.toml was edited and stays" in succeed("uninstall", copy)
    assert found(copy) == {"etc/firstbyte/config.toml", "usr/local/lib/firstbyte/of somebody else"}


def test_what_was_not_installed_is_not_removed(tmp_path: Path) -> None:
    done = script("uninstall", tmp_path)
    assert done.returncode == 1
    assert done.stderr == (
        f"uninstall: nothing was installed below {tmp_path}/usr/local by make install\n"
    )


# --- the units ---


def test_systemd_takes_the_units(tmp_path: Path) -> None:
    """But for a key that systemd knows since 254, and that earlier ones ignore."""
    units = [tmp_path / name for name in ("firstbyte.service", "firstbyte.socket")]
    for unit in units:
        text = (UNITS / unit.name).read_text()
        unit.write_text(text.replace("/usr/local/bin/firstbyte", "/bin/true"))
    assert complaints(*units) == []


def test_systemd_takes_the_unit_of_a_user(tmp_path: Path) -> None:
    unit = tmp_path / "firstbyte.service"
    text = (UNITS / "user/firstbyte.service").read_text()
    unit.write_text(text.replace("/usr/local/bin/firstbyte", "/bin/true"))
    environment = {**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)}
    assert complaints("--user", unit, environment=environment) == []
    assert re.findall(rf"^(?:{PRIVATE_MOUNTS}|NoNewPrivileges)=", text, re.MULTILINE) == []


def complaints(*arguments: str | Path, environment: Mapping[str, str] | None = None) -> list[str]:
    """What `systemd-analyze verify` has against units."""
    verify = ["systemd-analyze", "verify", "--man=no", *arguments]
    done = subprocess.run(
        verify, capture_output=True, text=True, timeout=SECONDS, check=True, env=environment
    )
    said = [line for line in done.stderr.splitlines() if "firstbyte" in line]
    return [line for line in said if "'FileDescriptorStorePreserve'" not in line]


def test_the_unit_is_hardened() -> None:
    rate = ["systemd-analyze", "security", "--offline=yes", f"--threshold={EXPOSURE}", "--no-pager"]
    done = subprocess.run(
        [*rate, UNITS / "firstbyte.service"],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stdout


def test_the_daemon_mounts_in_the_mount_namespace_of_the_node() -> None:
    text = (UNITS / "firstbyte.service").read_text()
    assert re.findall(rf"^(?:{PRIVATE_MOUNTS})=", text, re.MULTILINE) == []


@pytest.mark.root
def test_directories_are_for_root_alone(tmp_path: Path) -> None:
    create = [
        "systemd-tmpfiles",
        "--create",
        f"--root={tmp_path}",
        UNITS / "firstbyte.tmpfiles.conf",
    ]
    subprocess.run(create, timeout=SECONDS, check=True)
    for name in ("run", "var/lib"):
        assert (tmp_path / name / "firstbyte").stat().st_mode & 0o7777 == 0o700


# --- the service ---


class Node:
    """A machine with the service; `base` is shared with it."""

    def __init__(self, manager: Systemd, base: Path) -> None:
        self.manager = manager
        self.base = base
        self.run = manager.run

    def log(self) -> str:
        return (self.base / "log").read_text()

    def wait_ready(self) -> None:
        """Until the daemon that systemd has started answers."""
        pid = self.manager.show("firstbyte", "MainPID")
        wait_until(lambda: f"process {pid}" in self.run("firstbyte", "status").stdout)

    def program(self) -> str:
        """Which environment the daemon runs from."""
        pid = self.manager.show("firstbyte", "MainPID")
        command = self.run("cat", f"/proc/{pid}/cmdline").stdout
        return command.partition("/lib/firstbyte/")[2].partition("/")[0]


@contextmanager
def node(dest: Path, base: Path, *, socket: bool = False) -> Iterator[Node]:
    """systemd with an installation, its service started; with its socket unit before it."""
    (base / "lib").mkdir()
    (base / "log").touch()
    installed = dest / "usr/local/lib/systemd/system"
    unit = (installed / "firstbyte.service").read_text()
    output = f"append:{base}/log"
    log = f"[Service]\nStandardOutput={output}\nStandardError={output}\n"
    units = {"firstbyte.service": unit, "firstbyte.service.d/log.conf": log}
    if socket:
        units["firstbyte.socket"] = (installed / "firstbyte.socket").read_text()
    binds = {dest / "usr/local": "/usr/local", base / "lib": "/var/lib"}
    with systemd(units, binds) as manager:
        started = Node(manager, base)
        if socket:
            manager.run("systemctl", "start", "firstbyte.socket")
        done = manager.run("systemctl", "start", "firstbyte.service", check=False)
        assert done.returncode == 0, done.stderr + started.log() + manager.console()
        started.wait_ready()
        yield started
        manager.run("systemctl", "stop", "firstbyte.service")


@pytest.mark.root
def test_the_service_mounts_images_for_the_node(dest: Path, tmp_path: Path) -> None:
    """With the capabilities, system calls, devices and memory that the unit leaves it."""
    tree = tars.tar(tars.directory(b"etc"), tars.file(b"etc/name", b"content\n"))
    write_layout(tmp_path / "image", [tree])
    target = tmp_path / "target"
    target.mkdir()
    with node(dest, tmp_path) as here:
        here.run("firstbyte", "mount", f"oci:{tmp_path}/image", target)
        assert here.run("cat", target / "etc/name").stdout == "content\n"
        wait_until(lambda: "is local" in here.log())  # and proven, by a process of its own
        status = here.run("firstbyte", "status", "--json").stdout
        assert '"idmapped": ""' in status or "can be idmapped since" in status
        for name in ("run", "var/lib"):
            assert here.run("stat", "-c", "%a %U", f"/{name}/firstbyte").stdout == "700 root\n"
        socket = here.run("stat", "-c", "%a %F", "/run/firstbyte/firstbyte.sock").stdout
        assert socket == "600 socket\n"
        here.run("firstbyte", "umount", target)
        assert not re.search("(WARNING|ERROR)", here.log())


@pytest.mark.root
def test_a_daemon_that_is_killed_is_started_again(dest: Path, tmp_path: Path) -> None:
    with node(dest, tmp_path) as here:
        for _ in range(7):  # more often than systemd puts up with by default
            pid = here.manager.show("firstbyte", "MainPID")
            here.run("kill", "-9", pid)
            wait_until(lambda pid=pid: here.manager.show("firstbyte", "MainPID") not in (pid, "0"))
        here.wait_ready()
        assert here.manager.show("firstbyte", "NRestarts") == "7"


@pytest.mark.root
def test_an_upgrade_takes_effect_with_a_restart(dest: Path, tmp_path: Path) -> None:
    """Until then the daemon has its own program, of which it may not have loaded all. What is
    mounted, and read, goes on over the restart, and when the daemon is killed. A configuration
    that nobody has edited is replaced."""
    copy = tmp_path / "copy"
    shutil.copytree(dest, copy, symlinks=True)
    shipped = copy / "usr/local/share/doc/firstbyte/config.toml"
    config = copy / "etc/firstbyte/config.toml"
    for path in (shipped, config):
        path.write_text("# of an earlier version\n")
    write_layout(tmp_path / "image", [tars.tar(tars.file(b"name", b"content\n"))])
    target = tmp_path / "target"
    target.mkdir()
    with node(copy, tmp_path) as here:
        assert here.program() == "venv-1"
        succeed("install", copy)
        assert config.read_bytes() == shipped.read_bytes() == (UNITS / "config.toml").read_bytes()
        assert here.program() == "venv-1"
        here.run("firstbyte", "mount", "--mode", "fuse", f"oci:{tmp_path}/image", target)
        assert here.run("cat", target / "name").stdout == "content\n"
        wait_until(lambda: "is local" in here.log())
        here.run("systemctl", "restart", "firstbyte")
        assert here.program() == "venv-2"
        here.run("sh", "-c", "echo 3 >/proc/sys/vm/drop_caches")
        assert here.run("cat", target / "name").stdout == "content\n"
        pid = here.manager.show("firstbyte", "MainPID")
        here.run("kill", "-9", pid)
        wait_until(lambda: here.manager.show("firstbyte", "MainPID") not in ("0", pid))
        here.run("sh", "-c", "echo 3 >/proc/sys/vm/drop_caches")
        assert here.run("cat", target / "name").stdout == "content\n"
        assert here.log().count("going on with the file system") == 2
        wait_until(lambda: here.manager.show("firstbyte", "ActiveState") == "active")
        here.run("firstbyte", "umount", target)
    succeed("uninstall", copy)
    assert list(copy.iterdir()) == []


@pytest.mark.root
def test_containerd_waits_at_the_socket_unit_while_the_service_is_stopped(
    dest: Path, tmp_path: Path
) -> None:
    """And its call starts the service; a daemon that takes everything down leaves the socket."""
    address = "/run/firstbyte/firstbyte.sock"
    with node(dest, tmp_path, socket=True) as here:
        inode = here.run("stat", "-c", "%i %a", address).stdout
        assert inode.endswith(" 600\n")
        here.run("systemctl", "restart", "firstbyte")
        here.run("firstbyte", "daemon", "--stop")
        wait_until(lambda: here.log().count("ready: ") >= 3)  # Restart=always
        here.run("systemctl", "stop", "firstbyte.service")
        assert here.manager.show("firstbyte", "ActiveState") == "inactive"
        connect = f"import socket; s = socket.socket(socket.AF_UNIX); s.connect({address!r})"
        here.run("/usr/bin/python3", "-c", connect)
        wait_until(lambda: here.manager.show("firstbyte", "ActiveState") == "active")
        assert here.run("stat", "-c", "%i %a", address).stdout == inode
        assert not re.search("(WARNING|ERROR)", here.log())
