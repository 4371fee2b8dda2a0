"""FUSE messages as bytes, against the kernel's own structures, written out field by field."""

from __future__ import annotations

import ctypes
import errno
import os
import stat

from hypothesis import given
from hypothesis import strategies as st

from index.erofs.reader import Inode
from snapshotter.fuse import wire
from snapshotter.fuse.wire import FOR_EVER, Listing, OpenFlag

u16, u32, u64 = ctypes.c_uint16, ctypes.c_uint32, ctypes.c_uint64


class InHeader(ctypes.Structure):
    _fields_ = (
        ("len", u32),
        ("opcode", u32),
        ("unique", u64),
        ("nodeid", u64),
        ("uid", u32),
        ("gid", u32),
        ("pid", u32),
        ("total_extlen", u16),
        ("padding", u16),
    )


class ReadIn(ctypes.Structure):
    _fields_ = (
        ("fh", u64),
        ("offset", u64),
        ("size", u32),
        ("read_flags", u32),
        ("lock_owner", u64),
        ("flags", u32),
        ("padding", u32),
    )


class OutHeader(ctypes.Structure):
    _fields_ = (("len", u32), ("error", ctypes.c_int32), ("unique", u64))


class Attr(ctypes.Structure):
    _fields_ = (
        *((name, u64) for name in ("ino", "size", "blocks", "atime", "mtime", "ctime")),
        *((name, u32) for name in ("atimensec", "mtimensec", "ctimensec", "mode", "nlink")),
        *((name, u32) for name in ("uid", "gid", "rdev", "blksize", "flags")),
    )


class AttrOut(ctypes.Structure):
    _fields_ = (
        ("header", OutHeader),
        ("attr_valid", u64),
        ("attr_valid_nsec", u32),
        ("dummy", u32),
        ("attr", Attr),
    )


class Entry(ctypes.Structure):
    _fields_ = (
        ("nodeid", u64),
        ("generation", u64),
        ("entry_valid", u64),
        ("attr_valid", u64),
        ("entry_valid_nsec", u32),
        ("attr_valid_nsec", u32),
        ("attr", Attr),
    )


class EntryOut(ctypes.Structure):
    _fields_ = (("header", OutHeader), ("entry", Entry))


class OpenOut(ctypes.Structure):
    _fields_ = (
        ("header", OutHeader),
        ("fh", u64),
        ("open_flags", u32),
        ("padding", u32),
    )


class Direntplus(ctypes.Structure):
    _fields_ = (
        ("entry", Entry),
        ("ino", u64),
        ("off", u64),
        ("namelen", u32),
        ("type", u32),
    )


numbers = st.integers(0, 2**64 - 1)
counts = st.integers(0, 2**32 - 1)
kinds = st.sampled_from([stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK, stat.S_IFCHR, stat.S_IFIFO])
inodes = st.builds(
    Inode,
    nid=st.integers(0, 2**40 - 1),
    mode=st.builds(lambda kind, bits: kind | bits, kinds, st.integers(0, 0o7777)),
    uid=counts,
    gid=counts,
    size=st.integers(0, 2**48),
    mtime_ns=st.integers(-(2**62), 2**62),
    nlink=counts,
    rdev=st.tuples(st.integers(0, 2**12 - 1), st.integers(0, 2**20 - 1)),
)
names = st.binary(min_size=1, max_size=255)


def check_attributes(found: Attr, number: int, inode: Inode) -> None:
    assert (found.ino, found.mode, found.nlink) == (number, inode.mode, inode.nlink)
    assert (found.uid, found.gid) == (inode.uid, inode.gid)
    assert found.size == inode.size
    assert found.blocks == (inode.size + 511) // 512
    for time in ("atime", "mtime", "ctime"):
        seconds = ctypes.c_int64(getattr(found, time)).value
        assert seconds * 1_000_000_000 + getattr(found, time + "nsec") == inode.mtime_ns
    assert (os.major(found.rdev), os.minor(found.rdev)) == inode.rdev


@given(opcode=counts, unique=numbers, nodeid=numbers, thread=counts)
def test_a_request_tells_what_who_and_where(
    opcode: int, unique: int, nodeid: int, thread: int
) -> None:
    request = bytes(InHeader(len=40, opcode=opcode, unique=unique, nodeid=nodeid, pid=thread))
    assert len(request) == wire.IN_HEADER.size
    assert wire.REQUEST.unpack_from(request) == (opcode, unique, nodeid)
    assert wire.THREAD.unpack_from(request) == (thread,)


@given(offset=numbers, size=counts, handle=numbers, nodeid=numbers)
def test_a_read_tells_where_and_how_much(offset: int, size: int, handle: int, nodeid: int) -> None:
    body = bytearray(bytes(ReadIn(fh=handle, offset=offset, size=size, flags=os.O_DIRECT)))
    assert wire.READ_IN.unpack_from(body) == (offset, size)
    wire.HANDLE.pack_into(body, 0, nodeid)
    assert ReadIn.from_buffer(body).fh == nodeid
    assert wire.READ_IN.unpack_from(body) == (offset, size)


@given(unique=numbers, number=numbers, inode=inodes, seconds=counts)
def test_attributes_lie_where_the_kernel_has_them(
    unique: int, number: int, inode: Inode, seconds: int
) -> None:
    reply = wire.attributes_reply(unique, number, inode, seconds=seconds)
    found = AttrOut.from_buffer_copy(reply)
    assert ctypes.sizeof(found) == len(reply) == found.header.len
    assert (found.header.error, found.header.unique) == (0, unique)
    assert (found.attr_valid, found.attr_valid_nsec) == (seconds, 0)
    check_attributes(found.attr, number, inode)


@given(unique=numbers, number=numbers, inode=inodes, seconds=counts)
def test_entries_lie_where_the_kernel_has_them(
    unique: int, number: int, inode: Inode, seconds: int
) -> None:
    reply = wire.entry_reply(unique, number, inode, seconds=seconds)
    found = EntryOut.from_buffer_copy(reply)
    assert ctypes.sizeof(found) == len(reply) == found.header.len
    assert (found.header.error, found.header.unique) == (0, unique)
    assert (found.entry.nodeid, found.entry.generation) == (number, 0)
    assert (found.entry.entry_valid, found.entry.attr_valid) == (seconds, FOR_EVER)
    check_attributes(found.entry.attr, number, inode)


@given(unique=numbers)
def test_a_name_that_there_never_will_be_is_inode_0(unique: int) -> None:
    reply = wire.absent_reply(unique)
    found = EntryOut.from_buffer_copy(reply)
    assert ctypes.sizeof(found) == len(reply) == found.header.len
    assert (found.header.error, found.header.unique) == (0, unique)
    assert (found.entry.nodeid, found.entry.entry_valid) == (0, FOR_EVER)


@given(unique=numbers, handle=numbers)
def test_short_answers(unique: int, handle: int) -> None:
    opened = wire.open_reply(unique, handle, OpenFlag.KEEP_CACHE | OpenFlag.CACHE_DIR)
    found = OpenOut.from_buffer_copy(opened)
    assert ctypes.sizeof(found) == len(opened) == found.header.len
    assert (found.header.unique, found.fh, found.open_flags) == (unique, handle, 2 | 8)
    refused = OutHeader.from_buffer_copy(wire.error_reply(unique, errno.ENOSYS))
    assert (refused.len, refused.error, refused.unique) == (16, -errno.ENOSYS, unique)
    data = OutHeader.from_buffer_copy(wire.data_header(unique, 5))
    assert (data.len, data.error, data.unique) == (21, 0, unique)


@given(
    unique=numbers,
    entries=st.lists(st.tuples(names, numbers, inodes, st.booleans(), numbers), max_size=30),
    size=st.integers(0, 6000),
)
def test_a_listing_is_as_long_as_it_may_be(
    unique: int, entries: list[tuple[bytes, int, Inode, bool, int]], size: int
) -> None:
    listing = Listing(unique, size)
    taken = 0
    for name, number, inode, told, following in entries:
        if not (
            listing.add(name, number, inode, following)
            if told
            else listing.add_name(name, number, inode.mode, following)
        ):
            break
        taken += 1
    reply = listing.reply()
    header = OutHeader.from_buffer_copy(reply)
    assert (header.len, header.error, header.unique) == (len(reply), 0, unique)
    at = ctypes.sizeof(header)
    for name, number, inode, told, following in entries[:taken]:
        found = Direntplus.from_buffer_copy(reply, at)
        start = at + ctypes.sizeof(found)
        assert reply[start : start + found.namelen] == name
        assert (found.ino, found.off, found.type) == (number, following, inode.mode >> 12)
        if told:
            assert (found.entry.nodeid, found.entry.entry_valid) == (number, FOR_EVER)
            check_attributes(found.entry.attr, number, inode)
        else:
            assert found.entry.nodeid == 0  # counts as no LOOKUP
        at = start + len(name) + -len(name) % 8
    assert at == len(reply)
    assert len(reply) - ctypes.sizeof(header) <= size
    if taken < len(entries):
        name = entries[taken][0]
        more = ctypes.sizeof(Direntplus) + len(name) + -len(name) % 8
        assert len(reply) - ctypes.sizeof(header) + more > size
