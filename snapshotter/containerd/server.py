"""containerd's end of the daemon: a gRPC server on a unix socket, in front of a trio service.

gRPC's threads take calls; each call waits on one of them while a trio task does what it asks for.
When a call is over (its client gives up, its deadline passes, the daemon ends), its task is
cancelled.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote

import trio

from index.errors import FirstByteError
from snapshotter.containerd import errors
from snapshotter.containerd.calls import CALLS
from snapshotter.containerd.messages import SERVICE

# gRPC reads these when it is imported. The daemon's children never use it, so it need not follow
# forks; what it has to say about connections is not for the daemon's log.
os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
import grpc

if TYPE_CHECKING:
    import threading
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from snapshotter.containerd.calls import Call, Service
    from snapshotter.containerd.counters import CallCounters

log = logging.getLogger(__name__)
T = TypeVar("T")

# Calls that are at work, each on a thread that waits. Those that take long are Prepares that wait
# for a registry: one for each image that is being pulled, and a node pulls fewer than this at once.
WORKERS = 64
# Calls at work and waiting for a worker; what comes then is answered RESOURCE_EXHAUSTED, before
# anything of it is read.
CALLS_AT_ONCE = 256
MESSAGE_BYTES = 16 << 20  # of a request or response, as containerd has it
GRACE = 5.0  # seconds that calls have to end by themselves when the server ends
_LAST_WORDS = 2.0  # then for clients to take the answer that says so
_TELLING_APART = 0.1  # a call cancelled this many seconds before its deadline ended because of it
_DETAILS = 2000  # characters; a status travels in a header, and clients take 8 KiB of headers
_PATH_BYTES = 107  # of a unix socket's address

# What containerd asks for in the course of its work; every other FirstByteError is UNAVAILABLE.
_CODES: dict[type[errors.SnapshotError], grpc.StatusCode] = {
    errors.NotFoundError: grpc.StatusCode.NOT_FOUND,
    errors.AlreadyExistsError: grpc.StatusCode.ALREADY_EXISTS,
    errors.FailedPreconditionError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.InvalidArgumentError: grpc.StatusCode.INVALID_ARGUMENT,
}


class _StoppedError(Exception):
    """A call's task was cancelled, and this is why."""

    def __init__(self, code: grpc.StatusCode, why: str) -> None:
        super().__init__(why)
        self.code = code


async def serve(
    service: Service,
    address: Path,
    *,
    counters: CallCounters,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Answer containerd at the socket `address`, until cancelled.

    Only the owner can connect, from the first moment that there is a socket. The caller must know
    that nobody listens there: what a dead daemon left is replaced. Raises AddressError. When it is
    cancelled, no new call is taken, and calls that do not end within GRACE are told UNAVAILABLE.
    """
    work = _Work(service, counters, trio.lowlevel.current_trio_token())
    threads = ThreadPoolExecutor(WORKERS, thread_name_prefix="containerd")
    server = grpc.server(
        threads,
        handlers=[grpc.method_handlers_generic_handler(SERVICE, work.handlers())],
        options=(
            ("grpc.max_receive_message_length", MESSAGE_BYTES),
            ("grpc.max_send_message_length", MESSAGE_BYTES),
        ),
        maximum_concurrent_rpcs=CALLS_AT_ONCE,
    )
    _listen(server, address)
    task_status.started()
    try:
        await trio.sleep_forever()
    finally:
        with trio.CancelScope(shield=True):
            own = trio.CapacityLimiter(1)  # the others' threads may all be at work for these calls
            ended = _close(server, address)
            if not await trio.to_thread.run_sync(ended.wait, GRACE, limiter=own):
                work.stop()
                await trio.to_thread.run_sync(ended.wait, limiter=own)
            await trio.to_thread.run_sync(threads.shutdown, limiter=own)


def _listen(server: grpc.Server, address: Path) -> None:
    """Start `server` with its socket at `address`.

    gRPC gives its socket the mode that the umask leaves, and that is the whole process's. So the
    socket is made in a directory that nobody else can enter, and linked when its mode is right.

    Not renamed: between directories only one rename is under way in a whole file system, and it may
    be that of an overlayfs which copies a file up, and asks our mount for its attributes meanwhile.
    It would wait for us, and we for it, with everybody else who renames.
    """
    apart = address.with_name(f".{address.name}")
    made = apart / "s"
    if len(os.fsencode(made)) > _PATH_BYTES:
        raise errors.AddressError(
            f"the address for containerd is too long: {address}",
            hint=f"a socket's path has {_PATH_BYTES - 3} bytes at most here",
        )
    try:
        shutil.rmtree(apart, ignore_errors=True)
        apart.mkdir(mode=0o700)
        server.add_insecure_port(f"unix:{quote(os.fspath(made))}")
        server.start()
        made.chmod(0o600)
        address.unlink(missing_ok=True)
        address.hardlink_to(made)
        made.unlink()
        apart.rmdir()
    except (OSError, RuntimeError) as error:  # gRPC raises RuntimeError
        server.stop(None)
        shutil.rmtree(apart, ignore_errors=True)
        raise errors.AddressError(
            f"cannot listen for containerd at {address}: {error}",
            hint="its directory must exist and be writable",
        ) from error


def _close(server: grpc.Server, address: Path) -> threading.Event:
    """Take no calls from here on. The event comes when all calls have ended."""
    address.unlink(missing_ok=True)
    ended: threading.Event = server.stop(GRACE + _LAST_WORDS)
    return ended


class _Work:
    """The calls that are being answered."""

    def __init__(
        self, service: Service, counters: CallCounters, token: trio.lowlevel.TrioToken
    ) -> None:
        self._service = service
        self._counters = counters
        self._token = token
        self._tasks: set[trio.CancelScope] = set()  # of the trio thread
        self._stopped = False

    def handlers(self) -> dict[str, grpc.RpcMethodHandler]:
        """What gRPC calls for each method. Bytes come and go: errors in them are ours to name."""
        return {call.method.name: self._handler(call) for call in CALLS}

    def _handler(self, call: Call[Any]) -> grpc.RpcMethodHandler:
        if call.method.streams:
            return grpc.unary_stream_rpc_method_handler(
                lambda data, context: iter(self._answer(call, data, context))
            )
        return grpc.unary_unary_rpc_method_handler(
            lambda data, context: self._answer(call, data, context)[0]
        )

    def stop(self) -> None:
        """Cancel all calls, and those that still come."""
        self._stopped = True
        for task in self._tasks:
            task.cancel()

    def _answer(self, call: Call[T], data: bytes, context: grpc.ServicerContext) -> list[bytes]:
        """The responses to a request; otherwise gRPC's way out. On a thread of gRPC."""
        began = time.monotonic()
        self._counters.begin()
        code, details, responses = grpc.StatusCode.INTERNAL, "", []
        try:
            request = call.method.decode(data)
            result = self._perform(lambda: call.perform(self._service, request), context)
            responses = [
                response.SerializeToString() for response in call.respond(call.method, result)
            ]
            code = grpc.StatusCode.OK
        except Exception as error:
            code, details = _status(call.method.name, error)
        finally:
            self._counters.end(call.method.name, code.name, time.monotonic() - began)
        if code is not grpc.StatusCode.OK:
            context.abort(code, details)
        return responses

    def _perform(self, perform: Callable[[], Awaitable[T]], context: grpc.ServicerContext) -> T:
        """Run `perform` as a trio task for as long as the call lives. Raises _StoppedError."""
        task = trio.CancelScope()

        def over() -> None:
            # Comes for every call, so often when its task has ended, and trio perhaps with it.
            try:
                self._token.run_sync_soon(task.cancel)
            except trio.RunFinishedError:
                return

        async def run() -> T:
            if self._stopped:
                raise self._why_stopped(context)
            remaining = context.time_remaining()
            if remaining is not None:
                task.deadline = trio.current_time() + remaining
            self._tasks.add(task)
            try:
                with task:
                    return await perform()
            finally:
                self._tasks.discard(task)
            raise self._why_stopped(context)

        if not context.add_callback(over):
            raise self._why_stopped(context)
        return trio.from_thread.run(run, trio_token=self._token)

    def _why_stopped(self, context: grpc.ServicerContext) -> _StoppedError:
        if self._stopped:
            return _StoppedError(grpc.StatusCode.UNAVAILABLE, "the snapshotter is ending")
        remaining = context.time_remaining()
        if remaining is not None and remaining < _TELLING_APART:
            return _StoppedError(grpc.StatusCode.DEADLINE_EXCEEDED, "it took too long")
        return _StoppedError(grpc.StatusCode.CANCELLED, "the client gave up")


def _status(call: str, error: Exception) -> tuple[grpc.StatusCode, str]:
    """How an error is told to containerd, and what the log says of it."""
    details = _one_line(str(error))
    for kind, code in _CODES.items():
        if isinstance(error, kind):
            log.debug("%s answered %s: %s", call, code.name, details)
            return code, details
    match error:
        case _StoppedError():
            log.info("%s was stopped: %s", call, details)
            return error.code, details
        case FirstByteError():
            log.warning("%s failed: %s", call, details)
            return grpc.StatusCode.UNAVAILABLE, details
        case OSError(errno=errno.ENOSPC | errno.EDQUOT):
            log.warning("%s failed: %s", call, details)
            return grpc.StatusCode.RESOURCE_EXHAUSTED, details
        case OSError():
            log.warning("%s failed: %s", call, details)
            return grpc.StatusCode.INTERNAL, details
        case _:
            log.error("a mistake in FirstByte while handling %s", call, exc_info=error)
            return grpc.StatusCode.INTERNAL, _one_line(f"internal error: {error!r}")


def _one_line(text: str) -> str:
    """`text` as a status can carry it: file names in it may be no Unicode."""
    line = " ".join(text.split()) if "\n" in text else text
    return line[:_DETAILS].encode("utf-8", "backslashreplace").decode()
