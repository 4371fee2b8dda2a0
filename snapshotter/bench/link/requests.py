"""Finds the requests in what an HTTP/1.1 client sends, as far as failing and counting them needs.

Source: RFC 9112. Heads and bodies of a stated length are told apart. A stream that is something
else (TLS, chunked bodies, upgrades) is passed on from there as it is, and counted no more.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_MAX_HEAD = 64 << 10  # bytes; what is longer is no head
_REQUEST = re.compile(rb"[A-Z]{3,10} \S+ HTTP/1\.[01]\r\n")
_LENGTH = re.compile(rb"\r\nContent-Length:[ \t]*(\d{1,15})[ \t]*\r\n", re.IGNORECASE)
_OPAQUE = re.compile(rb"\r\n(?:Transfer-Encoding|Upgrade):", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of the stream. `begins` is true for the head of a request, which is one piece;
    `whole` if the request has no body, so that nothing of it comes after."""

    data: bytes
    begins: bool = False
    whole: bool = False


class RequestFinder:
    """Cuts one client's stream into pieces; their data together is the stream."""

    def __init__(self) -> None:
        self._head = bytearray()
        self._body = 0  # bytes of the current request's that are still to come
        self._opaque = False

    def feed(self, data: bytes) -> list[Piece]:
        """The pieces that `data` completes. An unfinished head is kept back."""
        pieces: list[Piece] = []
        while data:
            if self._opaque:
                pieces.append(Piece(data))
                break
            if self._body:
                body, data = data[: self._body], data[self._body :]
                self._body -= len(body)
                pieces.append(Piece(body))
                continue
            self._head += data
            end = self._head.find(b"\r\n\r\n")
            if end < 0:
                if not self._may_be_head():
                    self._opaque = True
                    pieces.append(Piece(self._taken(len(self._head))))
                break
            data = bytes(self._head[end + 4 :])
            pieces.append(self._begin(self._taken(end + 4)))
        return pieces

    def _taken(self, count: int) -> bytes:
        head = bytes(self._head[:count])
        self._head.clear()
        return head

    def _may_be_head(self) -> bool:
        line, newline, _ = self._head.partition(b"\n")
        complete = _REQUEST.fullmatch(line + newline) if newline else line[:1].isupper()
        return bool(complete) and len(self._head) <= _MAX_HEAD

    def _begin(self, head: bytes) -> Piece:
        if not _REQUEST.match(head) or _OPAQUE.search(head):
            self._opaque = True
            return Piece(head, begins=_REQUEST.match(head) is not None)
        length = _LENGTH.search(head)
        self._body = int(length[1]) if length else 0
        return Piece(head, begins=True, whole=not self._body)
