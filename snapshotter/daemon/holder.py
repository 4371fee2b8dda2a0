"""Holds descriptors for a daemon that may die, and does nothing else: `python -I -S holder.py`.

Standard input is a listening socket (SOCK_SEQPACKET). A connection sends messages, each answered:

    K<name>   keep the descriptor that comes along, in the place of one of that name
    F<name>   close it; with the last one the holder ends
    A         answered by the names, separated by zero bytes, and all descriptors
    W<name>, a zero byte, <message>
              write the message to that descriptor when the connection ends; it says no more
"""

import contextlib
import os
import select
import signal
import socket
import struct

_MESSAGE = 4096
_SECONDS = 10.0  # for who is connected to say something; others wait meanwhile
_DESCRIPTORS = 64  # of one message; the kernel takes 253


class Holder:
    """What is held, and what is written to it when a connection ends (one for each name)."""

    def __init__(self) -> None:
        self.held: dict[bytes, int] = {}
        self.was_used = False
        self.watched: dict[socket.socket, tuple[bytes, bytes]] = {}

    def answer(self, connection: socket.socket) -> None:
        """Serve one connection to its end, or until it is one to watch."""
        while True:
            message, descriptors, _, _ = socket.recv_fds(connection, _MESSAGE, 1)
            name = message[1:]
            if not message:
                return
            if message[:1] == b"K" and descriptors and self._has_room_for(name):
                self.forget(name)
                self.held[name] = descriptors.pop()
                self.was_used = True
                connection.send(b"ok")
            elif message[:1] == b"F":
                self.forget(name)
                connection.send(b"ok")
            elif message == b"A":
                names = b"\0".join(self.held) or b"\0"
                socket.send_fds(connection, [names], list(self.held.values()))
            elif message[:1] == b"W" and name.partition(b"\0")[0] in self.held:
                name, _, last = name.partition(b"\0")
                connection.send(b"ok")
                self.unwatch(name)
                self.watched[connection.dup()] = (name, last)
                return
            else:
                connection.send(b"what?")
            for descriptor in descriptors:
                os.close(descriptor)

    def _has_room_for(self, name: bytes) -> bool:
        return name in self.held or len(self.held) < _DESCRIPTORS

    def forget(self, name: bytes) -> None:
        self.unwatch(name)
        if name in self.held:
            os.close(self.held.pop(name))

    def unwatch(self, name: bytes) -> None:
        for connection in [c for c, (watched, _) in self.watched.items() if watched == name]:
            del self.watched[connection]
            connection.close()

    def end(self, connection: socket.socket) -> None:
        """Who was watched has ended."""
        name, last = self.watched.pop(connection)
        connection.close()
        with contextlib.suppress(OSError):
            os.write(self.held[name], last)


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)  # it ends when it is told, or is killed
    holder = Holder()
    with socket.socket(fileno=0) as listener:
        while holder.held or not holder.was_used:
            patience = None if holder.held else _SECONDS
            ready, _, _ = select.select([listener, *holder.watched], [], [], patience)
            if not ready:  # whoever has started it has died
                break
            for connection in ready:
                if connection in holder.watched:
                    holder.end(connection)
            if listener not in ready:
                continue
            connection, _ = listener.accept()
            with connection:
                connection.settimeout(_SECONDS)
                option = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
                _, uid, _ = struct.unpack("iII", option)
                if uid == os.geteuid():
                    with contextlib.suppress(OSError):  # the other side has died
                        holder.answer(connection)
        with contextlib.suppress(OSError):
            os.unlink(listener.getsockname())


if __name__ == "__main__":
    main()
