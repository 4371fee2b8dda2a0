"""Layers with every awkward case that an unpacker meets, for comparisons of whole trees."""

from __future__ import annotations

from tests.support.tars import (
    CAPABILITY,
    SECOND,
    Member,
    device,
    directory,
    fifo,
    file,
    hardlink,
    opaque,
    pax_header,
    sparse_old,
    sparse_pax,
    symlink,
    tar,
    whiteout,
)

NOT_UTF8 = b"caf\xe9-\xff\xfe"
LONGEST = b"n" * 255

TIMELESS = frozenset(
    {
        b"/missing",
        b"/missing/parents",
        b"/dangling",
        b"/dangling/made",
        b"/opaque/lower-directory",
        b"/reborn-late",
    }
)
"""Directories of `awkward_layers` whose times an unpacker makes up: no layer describes them, or a
whiteout further up takes names out of them."""


def awkward_layers() -> list[bytes]:
    """Uncompressed layers, lowest first. `umoci unpack` takes them all."""
    return [_base(), _metadata(), tar(), _changes(), b"", _order()]


def layers_beyond_umoci() -> list[bytes]:
    """Cases of containerd and GNU tar which `umoci unpack` refuses as an unknown type."""
    page = b"x" * 512
    return [
        tar(
            pax_header((b"comment", b"as git archive writes it"), kind=b"g"),
            directory(b"sparse"),
            sparse_old(b"sparse/old", 40_000, [(0, page * 2), (8192, page), (40_000, b"")]),
            sparse_old(
                b"sparse/old-extended",
                600_000,
                [*((n * 9728, page) for n in range(60)), (600_000, b"")],
            ),
            sparse_old(b"sparse/old-hole-only", 1 << 20, [(1 << 20, b"")]),
            Member(b"sparse/contiguous", b"7", b"a type of its own, read as a plain file"),
        )
    ]


def huge_layers() -> list[bytes]:
    """A sparse file of more than 4 GiB. By itself because an unpack writes all of its zeros."""
    size = (4 << 30) + 70_000
    runs = [(0, b"first" * 512), (1 << 20, b"m" * 1024), ((4 << 30) + 512, b"last"), (size, b"")]
    return [tar(sparse_pax(b"huge", size, runs))]


def _base() -> bytes:
    long_path = b"/".join([b"long-component-" + b"x" * 60] * 4)
    return tar(
        directory(b"./", mtime_ns=1_500_000_000 * SECOND),
        directory(b"./etc", mode=0o755),
        file(b"./etc/passwd", b"root:x:0:0:root:/root:/bin/sh\n"),
        file(b"./etc/empty"),
        directory(b"tmp", mode=0o1777),
        directory(b"usr"),
        directory(b"usr/bin", mtime_ns=1_400_000_000 * SECOND + 123_456_789),
        file(b"usr/bin/sh", b"#!" + b"s" * 5000, mode=0o755),
        file(b"usr/bin/su", b"su" * 700, mode=0o4755),
        file(b"usr/bin/wall", b"wall", mode=0o2755, gid=5),
        symlink(b"bin", b"usr/bin"),
        file(b"bin/through-a-link", b"lands in usr/bin", mode=0o755),
        symlink(b"absolute-link", b"/usr"),
        file(b"absolute-link/share", b"lands in usr"),
        symlink(b"escape", b"../../../usr"),
        file(b"escape/contained", b"lands in usr as well"),
        symlink(b"dangling-link", b"dangling/made"),
        file(b"dangling-link/file", b"its target is made"),
        file(b"missing/parents/file", b"nobody described its parents"),
        file(b"/absolute/../rooted", b"an absolute name"),
        file(b"../../above", b"a name that climbs"),
        directory(b"long-names"),
        directory(b"long-names/" + long_path.partition(b"/")[0]),
        *(
            directory(b"long-names/" + b"/".join(long_path.split(b"/")[:depth]))
            for depth in (2, 3, 4)
        ),
        file(b"long-names/" + long_path + b"/pax", b"pax"),
        file(b"long-names/" + long_path + b"/gnu", b"gnu", gnu=True),
        symlink(b"long-names/target-pax", b"t/" * 300 + b"end"),
        symlink(b"long-names/target-gnu", b"t/" * 300 + b"end", gnu=True),
        file(b"long-names/" + LONGEST, b"255 bytes"),
        file(b"long-names/gnu-" + LONGEST[4:], b"255 bytes", gnu=True),
        directory(NOT_UTF8),
        file(NOT_UTF8 + b"/" + b"\x80" * 200, b"not UTF-8 in PAX"),
        file(NOT_UTF8 + b"/\xc0", b"not UTF-8 in ustar"),
        symlink(NOT_UTF8 + b"/link", NOT_UTF8),
        directory(b"links"),
        file(b"links/one", b"one inode"),
        hardlink(b"links/two", b"links/one"),
        hardlink(b"links/three", b"./links/two"),
        symlink(b"links/symbolic", b"one"),
        hardlink(b"links/second-symbolic", b"links/symbolic"),
        file(b"links/replaced", b"before"),
        file(b"links/deleted", b"stays under its other name"),
        file(b"links/lower", b"linked to from a higher layer", uid=7),
        directory(b"links/tree"),
        file(b"links/tree/inside", b"linked to from outside"),
        hardlink(b"links/outside", b"links/tree/inside"),
        directory(b"becomes-file"),
        file(b"becomes-file/child", b"goes"),
        file(b"becomes-directory", b"goes"),
        symlink(b"link-becomes-directory", b"usr"),
        directory(b"becomes-link"),
        file(b"becomes-link/child", b"goes"),
        directory(b"hidden"),
        directory(b"hidden/deep"),
        file(b"hidden/deep/file", b"goes"),
        file(b"hidden-file", b"goes"),
        directory(b"opaque"),
        file(b"opaque/lower", b"goes"),
        directory(b"opaque/lower-directory"),
        file(b"opaque/lower-directory/file", b"goes"),
        directory(b"reborn"),
        file(b"reborn/lower", b"goes"),
        directory(b"reborn-late", mode=0o700),
        file(b"reborn-late/lower", b"goes"),
        file(b"twice", b"the first of two", mtime_ns=SECOND),
        hardlink(b"twice-linked", b"twice"),
        file(b"twice", b"the second of two", mtime_ns=2 * SECOND),
        directory(b"described-again", mode=0o700, xattrs={b"user.old": b"goes"}),
        file(b"described-again/child", b"stays"),
    )


def _metadata() -> bytes:
    page = b"".join(bytes([value]) * 512 for value in range(1, 31))
    return tar(
        directory(b"./", mode=0o755, mtime_ns=1_500_000_001 * SECOND),
        directory(b"devices"),
        device(b"devices/null", b"3", 1, 3, mode=0o666),
        device(b"devices/disk", b"4", 8, 300, mode=0o660, gid=6),
        device(b"devices/large", b"3", 0xFFF, 0xFFFFF),
        hardlink(b"devices/null-linked", b"devices/null"),
        fifo(b"devices/fifo", mode=0o600),
        directory(b"xattrs", xattrs={b"user.directory": b"\0\n=1", b"trusted.d": b"t"}),
        file(
            b"xattrs/binary",
            b"x",
            xattrs={b"user.binary": bytes(range(256)), b"user.equals": b"="},
        ),
        file(b"xattrs/trusted", b"x", xattrs={b"trusted.name": b"\xff\0\xfe"}),
        file(b"xattrs/capable", b"x", mode=0o755, xattrs={b"security.capability": CAPABILITY}),
        symlink(b"xattrs/link", b"binary", xattrs={b"trusted.link": b"on a symbolic link"}),
        fifo(b"xattrs/fifo", xattrs={b"trusted.fifo": b"on a FIFO"}),
        directory(b"times"),
        file(b"times/before-1970", mtime_ns=-86_400 * SECOND),
        file(b"times/before-1970-and-a-bit", mtime_ns=-1_500_000_000),
        file(b"times/before-1970-gnu", mtime_ns=-86_400 * SECOND, gnu=True),
        file(b"times/after-2038", mtime_ns=4_102_444_800 * SECOND + 1),
        file(b"times/nanoseconds", mtime_ns=1_234_567_890_123_456_789),
        symlink(b"times/link", b"nowhere", mtime_ns=987_654_321 * SECOND + 5),
        directory(b"owners", uid=70_000, gid=80_000),
        file(b"owners/large", uid=3_000_000_000, gid=4_000_000_000),
        file(b"owners/large-gnu", uid=3_000_000_000, gid=4_000_000_000, gnu=True),
        symlink(b"owners/link", b"nowhere", uid=123_456),
        file(b"owners/no-permissions", b"secret", mode=0),
        directory(b"sparse"),
        sparse_pax(b"sparse/0.0", 20_000, [(512, page[:2048]), (19_000, b"end" * 300)], "0.0"),
        sparse_pax(b"sparse/0.1", 20_000, [(512, page[:2048]), (10_240, b"e" * 512)], "0.1"),
        sparse_pax(b"sparse/1.0", 70_000, [(4096, page), (65_536, b"end of file")]),
        sparse_pax(
            b"sparse/unaligned", 9000, [(100, b"a" * 700), (1000, b"b" * 24), (5000, b"c" * 4000)]
        ),
        file(b"sparse/after", b"the member after them"),
    )


def _changes() -> bytes:
    return tar(
        whiteout(b"hidden"),
        whiteout(b"hidden-file"),
        whiteout(b"never-existed"),
        whiteout(b"no/such/parent"),
        whiteout(b"links/deleted-twin"),
        hardlink(b"links/deleted-other", b"links/deleted"),
        whiteout(b"links/deleted"),
        file(b"links/replaced", b"after"),
        hardlink(b"links/from-above", b"links/lower"),
        whiteout(b"links/tree"),
        file(b"becomes-file", b"was a directory"),
        directory(b"becomes-directory"),
        file(b"becomes-directory/child", b"was a file's place"),
        directory(b"link-becomes-directory"),
        file(b"link-becomes-directory/child", b"does not land in usr"),
        symlink(b"becomes-link", b"usr"),
        directory(b"described-again", mode=0o750, uid=9, xattrs={b"user.new": b"comes"}),
        Member(b".wh..wh.plnk", b"5"),
        Member(b"usr/.wh..wh.aufs"),
    )


def _order() -> bytes:
    return tar(
        # The opaque mark after what the layer puts in, and in another case before it.
        file(b"opaque/upper", b"stays"),
        file(b"opaque/lower-directory/upper", b"stays"),
        opaque(b"opaque"),
        whiteout(b"reborn"),
        directory(b"reborn", mode=0o711),
        file(b"reborn/upper", b"stays"),
        directory(b"reborn-late", mode=0o755),
        file(b"reborn-late/upper", b"stays"),
        whiteout(b"reborn-late"),
        file(b"links/one", b"replaced, while two and three keep the old inode"),
        whiteout(b"links/lower"),
        file(b"twice", b"the third"),
    )
