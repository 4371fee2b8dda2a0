"""The mount table's text, and what it says."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapshotter.mounts.errors import MountError
from snapshotter.mounts.table import MountEntry, mount_at, parse_mountinfo, read_mounts

# A name as the kernel may hold it: any bytes but NUL.
names = st.binary(min_size=1, max_size=40).map(lambda name: name.replace(b"\0", b"\\"))
words = st.text("abcdefghijklmnop0123456789_=", min_size=1, max_size=12).map(str.encode)
entries = st.builds(
    MountEntry,
    mount_id=st.integers(1, 1 << 31),
    parent_id=st.integers(1, 1 << 31),
    device=st.tuples(st.integers(0, 4095), st.integers(0, 1 << 20)),
    root=names.map(lambda name: b"/" + name),
    point=names.map(lambda name: b"/" + name),
    options=st.lists(words, min_size=1, max_size=4).map(tuple),
    optional=st.lists(words.map(lambda word: b"shared:" + word), max_size=3).map(tuple),
    kind=words,
    source=names,
    super_options=st.lists(words, min_size=1, max_size=4).map(tuple),
)


def escape(name: bytes) -> bytes:
    """As the kernel writes names: mangle() in fs/proc_namespace.c."""
    for byte in b"\\ \t\n#":  # the backslash first
        name = name.replace(bytes((byte,)), b"\\%03o" % byte)
    return name


def write(entry: MountEntry) -> bytes:
    fields = [
        b"%d" % entry.mount_id,
        b"%d" % entry.parent_id,
        b"%d:%d" % entry.device,
        escape(entry.root),
        escape(entry.point),
        b",".join(entry.options),
        *entry.optional,
        b"-",
        escape(entry.kind),
        escape(entry.source),
        b",".join(map(escape, entry.super_options)),
    ]
    return b" ".join(fields) + b"\n"


@given(st.lists(entries, max_size=5))
def test_what_the_kernel_writes_is_read_back(table: list[MountEntry]) -> None:
    assert parse_mountinfo(b"".join(map(write, table))) == table


@given(st.binary(max_size=200))
def test_other_text_is_refused_or_read_and_never_crashes(text: bytes) -> None:
    with suppress(MountError):
        assert all(entry.point for entry in parse_mountinfo(text))


def test_the_documented_example_is_read() -> None:
    """From proc_pid_mountinfo(5)."""
    line = b"36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue\n"
    assert parse_mountinfo(line) == [
        MountEntry(
            36,
            35,
            (98, 0),
            b"/mnt1",
            b"/mnt2",
            (b"rw", b"noatime"),
            (b"master:1",),
            b"ext3",
            b"/dev/root",
            (b"rw", b"errors=continue"),
        )
    ]


def test_a_truncated_line_is_an_error() -> None:
    with pytest.raises(MountError, match="another form"):
        parse_mountinfo(b"36 35 98:0 /mnt1 /mnt2 rw,noatime master:1\n")


def test_this_machine_has_proc_and_it_is_found() -> None:
    entry = mount_at(Path("/proc"))
    assert entry is not None
    assert entry.kind == b"proc"
    status = os.stat("/proc")
    assert entry.device == (os.major(status.st_dev), os.minor(status.st_dev))
    assert entry in read_mounts()
    assert mount_at(Path("/proc/self")) is None
