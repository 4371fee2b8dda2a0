"""Paths inside images, as bytes: how they are cleaned and how messages show them."""

from __future__ import annotations

from index.errors import TarError

NAME_MAX = 255
"""Bytes in one component of a path: Linux's NAME_MAX, and EROFS's (name offsets are its own)."""

_SHOWN = 200  # a hostile name can be 1 MiB long, a message should not


def quoted(path: bytes) -> str:
    """`path` for a message: quoted, on one line, bytes that are not ASCII as escapes."""
    return repr(path)[1:] if len(path) <= _SHOWN else repr(path[:_SHOWN])[1:] + "…"


def components(path: bytes) -> list[bytes]:
    """Clean a path as container runtimes do, without looking at any tree.

    Absolute paths count from the image's root, `.` and empty components vanish, `..` removes the
    component before it and stays at the root (Go's `filepath.Clean("/" + path)`, which both
    containerd and umoci apply to the names of tar members before they resolve symbolic links).
    """
    parts = path.split(b"/")
    if b"" in parts or b"." in parts or b".." in parts:
        cleaned: list[bytes] = []
        for part in parts:
            if part == b"..":
                if cleaned:
                    cleaned.pop()
            elif part and part != b".":
                cleaned.append(part)
        return cleaned
    return parts


def check_component(name: bytes) -> None:
    """Raise TarError for a name that no Linux file system can hold."""
    if len(name) > NAME_MAX:
        raise TarError(f"the name {quoted(name)} has {len(name)} bytes, more than {NAME_MAX}")
    if b"\0" in name:
        raise TarError(f"the name {quoted(name)} holds a NUL byte")
