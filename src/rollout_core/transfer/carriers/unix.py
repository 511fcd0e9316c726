"""Unix sockets between processes of one machine: pairs, pipes that the caller has, or names that leave no file."""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, Final, Protocol, TypeVar

from rollout_core.errors import TransferError

_RETRY: Final = 0.02  # seconds between attempts to connect
_LOOK: Final = 0.05  # seconds between looks at whether waiting still makes sense
_WANTED: Final = "is no Unix stream socket; pass one end of socket.socketpair() or of a duplex Pipe()"
Made = TypeVar("Made")


class HasFileno(Protocol):
    """A socket, or a ``multiprocessing`` connection, whose pipe is one."""

    def fileno(self) -> int: ...


def listen(name: str, receivers: int, timeout: float, check: Callable[[], None] | None = None) -> list[socket.socket]:
    """Wait for ``receivers`` processes of the same user that ``connect`` to ``name``, at most ``timeout`` seconds; in the order in
    which they came. ``TransferError`` if the name is in use, or somebody does not come in time. ``check`` is called every now and
    then: what it raises ends the wait."""
    return _gathered([name] * receivers, timeout, check)


def listen_each(names: Sequence[str], timeout: float, check: Callable[[], None] | None = None) -> list[socket.socket]:
    """``listen`` for one process at each of these names, in their order."""
    return _gathered(names, timeout, check)


def _gathered(names: Sequence[str], timeout: float, check: Callable[[], None] | None) -> list[socket.socket]:
    """A connection for each name; as many to one as it stands there."""
    deadline = time.monotonic() + timeout
    accepted: list[socket.socket] = []
    with ExitStack() as stack:
        listeners = {name: stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)) for name in names}
        for name, listener in listeners.items():
            try:
                listener.bind(_address(name))
                listener.listen(names.count(name))
            except OSError as error:
                raise TransferError(f"no receiver can be waited for at {name!r}: {error}") from error
        for name in names:
            try:
                accepted.append(_accepted(listeners[name], deadline, check))
            except BaseException as error:
                close_all(accepted)
                if isinstance(error, TimeoutError):
                    came = f"{len(accepted)} of {len(names)} receivers connected"
                    raise TransferError(f"{came} to {name!r} within {timeout:g} s") from error
                raise
    return accepted


def _accepted(listener: socket.socket, deadline: float, check: Callable[[], None] | None) -> socket.socket:
    """The next connection of the same user. ``TimeoutError`` after the deadline."""
    while True:
        left = max(0.001, deadline - time.monotonic())
        listener.settimeout(left if check is None else min(left, _LOOK))
        try:
            one = listener.accept()[0]
        except TimeoutError:
            if check is None or time.monotonic() >= deadline:
                raise
            check()
            continue
        if _peer_user(one) in (0, os.getuid()):  # an abstract name has no permissions of its own
            return one
        one.close()


def connect(name: str, timeout: float) -> socket.socket:
    """Connect to who of the same user listens at ``name``, or will within ``timeout`` seconds. ``TransferError`` after."""
    deadline = time.monotonic() + timeout
    while True:
        one = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        one.setblocking(False)  # a listener whose queue is full would be waited for without end
        try:
            one.connect(_address(name))
            if _peer_user(one) not in (0, os.getuid()):
                raise TransferError(f"who listens at {name!r} is of another user")
        except OSError as error:
            one.close()
            if time.monotonic() >= deadline:
                raise TransferError(f"no sender listens at {name!r} within {timeout:g} s: {error}") from error
            time.sleep(_RETRY)
        except BaseException:
            one.close()
            raise
        else:
            one.setblocking(True)
            return one


def joined(make: Callable[[Sequence[socket.socket]], Made], sockets: Sequence[socket.socket]) -> Made:
    """An end made of these, which it duplicates."""
    try:
        return make(sockets)
    finally:
        close_all(sockets)


def stream_socket(one: HasFileno | int) -> socket.socket:
    """A duplicate. ``TransferError`` for what is no Unix stream socket, such as the end of a one-way pipe."""
    copy = -1
    try:
        copy = os.dup(one if isinstance(one, int) else one.fileno())
        ours = socket.socket(fileno=copy)
    except OSError as error:
        if copy >= 0:
            os.close(copy)
        raise TransferError(f"{one!r} {_WANTED} ({error})") from error
    if ours.family != socket.AF_UNIX or ours.type != socket.SOCK_STREAM:
        ours.close()
        raise TransferError(f"{one!r} {_WANTED}")
    return ours


def stream_sockets(sockets: Sequence[HasFileno | int]) -> list[socket.socket]:
    """A duplicate of each, or of none: see ``stream_socket``."""
    ours: list[socket.socket] = []
    try:
        for one in sockets:
            ours.append(stream_socket(one))
    except BaseException:
        close_all(ours)
        raise
    return ours


def close_all(sockets: Sequence[socket.socket]) -> None:
    for one in sockets:
        one.close()


def _address(name: str) -> bytes:
    """The name in the abstract namespace of Unix sockets (unix(7)), which leaves no file."""
    return b"\0rollout-core/" + name.encode()


def _peer_user(one: socket.socket) -> int:
    """The user id of the process at the other end (SO_PEERCRED, unix(7))."""
    credentials: tuple[Any, ...] = struct.unpack("3i", one.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    return int(credentials[1])
