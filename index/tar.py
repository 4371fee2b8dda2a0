"""The scanner: a layer's uncompressed tar goes in, in pieces of any size, and entries come out.

File contents are skipped, not copied: an entry only says where in the stream they lie. Formats:
old V7, POSIX ustar and pax, GNU (long names, base-256 numbers, sparse files in all four ways),
star's prefix. Where standards leave a choice the scanner does what Go's archive/tar does, because
the container runtimes whose result must be matched are built on it.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, NoReturn

from index import sparse
from index.entry import Entry, EntryType, Segment
from index.errors import FirstByteError, TarError, UnsupportedError
from index.header import BLOCK, Header, parse_header, parse_number
from index.names import quoted
from index.pax import parse_integer, parse_records

if TYPE_CHECKING:
    from collections.abc import Generator

MAX_SIZE = 1 << 41
"""Bytes of a file, exclusive: EROFS counts blocks of 512 bytes in 32 bits."""

MAX_SPECIAL = 1 << 20
"""Bytes of a PAX header or GNU long name; the limit of Go's archive/tar."""

MAX_EMBEDDED = 64 << 20
"""Bytes of data per layer that blocks cannot address. Guessed: tools that write such sparse files
are rare, GNU tar's own segments are whole blocks."""

_ZEROS = bytes(BLOCK)

_TYPES = {
    b"0": EntryType.REGULAR,
    b"\0": EntryType.REGULAR,
    b"7": EntryType.REGULAR,  # contiguous file
    b"S": EntryType.REGULAR,  # sparse, old GNU format
    b"1": EntryType.HARDLINK,
    b"2": EntryType.SYMLINK,
    b"3": EntryType.CHARACTER,
    b"4": EntryType.BLOCK,
    b"5": EntryType.DIRECTORY,
    b"6": EntryType.FIFO,
}


class TarScanner:
    """Push parser of one layer: `feed` it the stream, then `finish`.

    Who can read the stream at any place need not feed what the scanner would drop anyway, mostly
    the contents of files: `skip` as much of it as `skippable` tells.

    Two blocks of zeros end the archive; what follows is ignored. Like Go's archive/tar, a stream
    that ends between two members without them is complete, and so is an empty one.

    Every error is a TarError, or UnsupportedError for well-formed input that FirstByte cannot
    serve; it names the member and the byte at which it starts. After an error the scanner is
    spent: it raises the same error again.
    """

    def __init__(self) -> None:
        self._entries: list[Entry] = []
        self._failure: FirstByteError | None = None
        self._ended = False
        self._between_members = True
        self._member = b""  # for messages
        self._member_start = 0
        self._position = 0  # of the parser: what it has asked for is behind it
        self._embedded = 0
        # The driver's side: bytes to drop, then bytes to hand to the parser.
        self._skip = 0
        self._pending = bytearray()
        self._parser = self._parse()
        self._want = next(self._parser)

    def feed(self, data: bytes | memoryview) -> list[Entry]:
        """Take the next piece of the stream; return the entries that it completed, in order."""
        if self._failure:
            raise self._failure
        at, end = 0, len(data)
        while not self._ended:
            if self._skip:
                step = min(self._skip, end - at)
                at += step
                self._skip -= step
            missing = self._want - len(self._pending)
            if self._skip or end - at < missing:
                self._pending += data[at:]
                break
            piece = bytes(data[at : at + missing])
            at += missing
            if self._pending:
                piece = bytes(self._pending) + piece
                self._pending.clear()
            self._position += self._want
            self._advance(piece)
        entries, self._entries = self._entries, []
        return entries

    @property
    def skippable(self) -> int:
        """How many of the stream's next bytes need not be fed; sys.maxsize past the archive."""
        return sys.maxsize if self._ended else self._skip

    def skip(self, length: int) -> None:
        """The next `length` bytes of the stream, at most `skippable`, are passed over unseen."""
        if self._failure:
            raise self._failure
        if not 0 <= length <= self.skippable:
            raise ValueError(f"{length} bytes to skip of {self.skippable}")
        if not self._ended:
            self._skip -= length

    def finish(self) -> None:
        """Say that the stream is over. Raises TarError if a member is incomplete."""
        if self._failure:
            raise self._failure
        if self._ended or (self._between_members and not self._skip and not self._pending):
            return
        if self._between_members and not self._skip:
            self._member, self._member_start = b"", self._position
        self._fail("the archive ends in the middle of it")

    def _advance(self, piece: bytes) -> None:
        try:
            self._want = self._parser.send(piece)
        except StopIteration:
            self._ended = True
        except ValueError as error:
            self._fail(str(error))
        except UnsupportedError as error:
            self._fail(error.message, UnsupportedError)

    def _fail(self, problem: str, kind: type[FirstByteError] = TarError) -> NoReturn:
        member = quoted(self._member) if self._member else "header"
        self._failure = kind(f"tar member {member} at byte {self._member_start}: {problem}")
        raise self._failure

    # The parser proper: a generator that yields how many bytes it wants next. ValueErrors become
    # TarErrors in _advance.

    def _drop(self, length: int) -> None:
        self._skip += length
        self._position += length

    def _parse(self) -> Generator[int, bytes, None]:
        records: list[tuple[bytes, bytes]] = []
        long_name = long_link = b""
        while True:
            self._between_members = not (records or long_name or long_link)
            block = yield BLOCK
            if self._between_members:
                self._member, self._member_start = b"", self._position - BLOCK
            if block == _ZEROS:
                if not self._between_members:
                    raise ValueError("the member that an extended header announces is missing")
                if (yield BLOCK) != _ZEROS:
                    raise ValueError("a single block of zeros inside the archive")
                return
            self._between_members = False
            header = parse_header(block)
            self._member = self._member or header.name
            if header.kind in b"xgLK":
                data = yield from self._special(header.size)
                if header.kind == b"x":
                    records = parse_records(data)
                elif header.kind == b"L":
                    long_name = data.partition(b"\0")[0]
                elif header.kind == b"K":
                    long_link = data.partition(b"\0")[0]
                else:
                    # Go's archive/tar, and hence every runtime, checks global headers and does
                    # not apply them to the members that follow.
                    parse_records(data)
                continue
            pax = header.override(records) if records else {}
            header.name = self._member = long_name or header.name
            header.linkname = long_link or header.linkname
            if sparse.OFFSET in pax:
                pax[sparse.MAP] = sparse.join_pairs(records)
            yield from self._file(header, block, pax)
            records, long_name, long_link = [], b"", b""

    def _special(self, size: int) -> Generator[int, bytes, bytes]:
        """The data of a member that describes another one."""
        if not 0 <= size <= MAX_SPECIAL:
            raise ValueError(f"it is an extended header of {size} bytes, limit {MAX_SPECIAL}")
        data = yield size
        self._drop(-size % BLOCK)
        return data

    def _file(
        self, header: Header, block: bytes, pax: dict[bytes, bytes]
    ) -> Generator[int, bytes, None]:
        """A member that makes something in a tree. Its data is dropped, or read where loose."""
        kind = _TYPES.get(header.kind)
        if kind is None:
            raise UnsupportedError(f"FirstByte does not handle its type {header.kind!r}")
        if header.kind == b"\0" and header.name.endswith(b"/"):
            kind = EntryType.DIRECTORY  # V7 had no type for them
        header.check_owner()
        size = 0
        segments: tuple[Segment, ...] = ()
        embedded: tuple[tuple[int, bytes], ...] = ()
        # Members of all other types have no data, whatever their size field says.
        if kind is EntryType.REGULAR:
            _check_size(header.size)
            if header.kind == b"S" or pax:
                size, segments, embedded = yield from self._sparse_data(header, block, pax)
            else:
                size, segments = header.size, self._plain_data(header.size)
        self._entries.append(
            Entry(
                header.name,
                kind,
                header.mode,
                header.uid,
                header.gid,
                size,
                header.mtime_ns,
                header.linkname,
                header.major,
                header.minor,
                header.xattrs,
                segments,
                embedded,
            )
        )

    def _plain_data(self, size: int) -> tuple[Segment, ...]:
        if not size:
            return ()
        segment = Segment(0, self._position, size)
        self._drop(size + -size % BLOCK)
        return (segment,)

    def _sparse_data(
        self, header: Header, block: bytes, pax: dict[bytes, bytes]
    ) -> Generator[int, bytes, tuple[int, tuple[Segment, ...], tuple[tuple[int, bytes], ...]]]:
        """The data of a file that may be sparse: its size, and what is where."""
        version = None
        end = self._position + header.size
        if header.kind == b"S":
            if not header.is_gnu:
                raise ValueError("it is sparse, but its header is not in GNU format")
            entries = yield from self._old_map(block)
            end = self._position + header.size  # the map's blocks do not count
            size = parse_number(block[sparse.OLD_HEADER_SIZE])
        elif version := sparse.version(pax):
            header.name = self._member = pax.get(b"GNU.sparse.name") or header.name
            size_record = pax.get(b"GNU.sparse.size") or pax.get(b"GNU.sparse.realsize")
            size = parse_integer(size_record) if size_record else header.size
            if version == (1, 0):
                entries = yield from self._map_1_0(end)
            else:
                entries = sparse.parse_0_1(pax)
        else:
            return header.size, self._plain_data(header.size), ()
        _check_size(size)
        sparse.check_map(entries, size, end - self._position)
        segments, embedded = [], []
        for piece in sparse.place(entries, size, self._position):
            if isinstance(piece, Segment):
                segments.append(piece)
                continue
            self._embedded += piece.length
            if self._embedded > MAX_EMBEDDED:
                raise UnsupportedError(
                    f"the layer has more than {MAX_EMBEDDED} bytes of sparse data "
                    "that do not start on a block"
                )
            self._drop(piece.raw_offset - self._position)
            embedded.append((piece.file_offset, (yield piece.length)))
        self._drop(end - self._position + -header.size % BLOCK)
        return size, tuple(segments), tuple(embedded)

    def _old_map(self, block: bytes) -> Generator[int, bytes, sparse.SparseMap]:
        entries = sparse.parse_old(block[sparse.OLD_HEADER_MAP])
        is_extended = block[sparse.OLD_HEADER_EXTENDED]
        while is_extended and len(entries) <= sparse.MAX_ENTRIES:
            block = yield BLOCK
            entries += sparse.parse_old(block[sparse.OLD_BLOCK_MAP])
            is_extended = block[sparse.OLD_BLOCK_EXTENDED]
        return entries

    def _map_1_0(self, end: int) -> Generator[int, bytes, sparse.SparseMap]:
        reader = sparse.Map10()
        while reader.entries is None:
            if self._position + BLOCK > end:
                raise ValueError("its sparse map is longer than its data")
            reader.feed((yield BLOCK))
        return reader.entries


def _check_size(size: int) -> None:
    if size < 0:
        raise ValueError(f"its size {size} is negative")
    if size >= MAX_SIZE:
        raise UnsupportedError(f"its size {size} is not below {MAX_SIZE} bytes")
