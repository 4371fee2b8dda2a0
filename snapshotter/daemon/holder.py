"""Holds descriptors for a daemon that may die, and does nothing else: `python -I -S holder.py`.

Standard input is a listening socket (SOCK_SEQPACKET). A connection sends messages, each answered:

    K<name>   keep the descriptor that comes along, in the place of one of that name
    F<name>   close it; with the last one the holder ends
    A         answered by the names, separated by zero bytes, and all descriptors
"""

import contextlib
import os
import signal
import socket
import struct

_MESSAGE = 4096
_SECONDS = 10.0  # for who is connected to say something; others wait meanwhile
_DESCRIPTORS = 64  # of one message; the kernel takes 253


def answer(connection: socket.socket, held: dict[bytes, int]) -> None:
    """Serve one connection to its end."""
    while True:
        message, descriptors, _, _ = socket.recv_fds(connection, _MESSAGE, 1)
        name = message[1:]
        if not message:
            return
        if message[:1] == b"K" and descriptors and (name in held or len(held) < _DESCRIPTORS):
            forget(name, held)
            held[name] = descriptors.pop()
            connection.send(b"ok")
        elif message[:1] == b"F":
            forget(name, held)
            connection.send(b"ok")
        elif message == b"A":
            socket.send_fds(connection, [b"\0".join(held) or b"\0"], list(held.values()))
        else:
            connection.send(b"what?")
        for descriptor in descriptors:
            os.close(descriptor)


def forget(name: bytes, held: dict[bytes, int]) -> None:
    if name in held:
        os.close(held.pop(name))


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)  # it ends when it is told, or is killed
    held: dict[bytes, int] = {}
    was_used = False
    with socket.socket(fileno=0) as listener:
        while held or not was_used:
            connection, _ = listener.accept()
            with connection:
                connection.settimeout(_SECONDS)
                option = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
                _, uid, _ = struct.unpack("iII", option)
                if uid == os.geteuid():
                    with contextlib.suppress(OSError):  # the other side has died
                        answer(connection, held)
                    was_used = True
        with contextlib.suppress(OSError):
            os.unlink(listener.getsockname())


if __name__ == "__main__":
    main()
