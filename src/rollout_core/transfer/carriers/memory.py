"""Between processes of one machine: slots in shared memory, messages over Unix sockets. The bytes are not copied on the way.

Nothing of it has a name in the file system: the memory is a memfd, sockets are pairs or of the abstract namespace (unix(7)). What
the processes leave, however they end, the kernel frees with the last of them.
"""

from __future__ import annotations

import os
import select
import socket
import struct
import time
from collections.abc import Sequence
from typing import Any, Final, Protocol

import msgspec
import torch

from rollout_core.errors import TransferError
from rollout_core.transfer.arena import Arena
from rollout_core.transfer.carriers.contract import Moving
from rollout_core.transfer.carriers.links import LinkedReceiver, LinkedSender

_GREETING: Final = b"rollout-core memory 1"
_RETRY: Final = 0.02  # seconds between attempts to connect


class HasFileno(Protocol):
    """A socket, or a ``multiprocessing`` connection, whose pipe is one."""

    def fileno(self) -> int: ...


class _Ticket(msgspec.Struct, frozen=True, array_like=True):
    stride: int  # bytes from slot to slot
    total: int  # bytes of the memory


class MemorySender(LinkedSender):
    """The sender's end. ``sockets``: for each receiver one end of a Unix stream socket pair, or of a duplex
    ``multiprocessing.Pipe()``, that nothing else is sent over; it is duplicated, and the caller's own may be closed.

    The memory is kept between updates. It has the size of the slots: two buckets, unless ``send`` is told otherwise.
    """

    rendezvous: Final = False

    def __init__(self, sockets: Sequence[HasFileno]) -> None:
        self._arena = Arena()
        ours: list[socket.socket] = []
        try:
            for one in sockets:
                ours.append(_stream_socket(one))
                socket.send_fds(ours[-1], [_GREETING], [self._arena.fd])
        except BaseException as error:
            _close(ours)
            self._arena.close()
            if isinstance(error, OSError):
                raise TransferError(f"receiver {len(ours) - 1} cannot be given the shared memory: {error}") from error
            raise
        super().__init__(ours)

    @classmethod
    def listen(cls, name: str, receivers: int = 1, *, timeout: float = 60.0) -> MemorySender:
        """Wait for ``receivers`` processes of the same user to ``MemoryReceiver.connect`` to ``name``, at most ``timeout`` seconds.

        They are numbered as they come. ``TransferError`` if the name is in use, or somebody does not come in time.
        """
        deadline = time.monotonic() + timeout
        accepted: list[socket.socket] = []
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            try:
                listener.bind(_address(name))
                listener.listen(receivers)
            except OSError as error:
                raise TransferError(f"no receiver can be waited for at {name!r}: {error}") from error
            try:
                while len(accepted) < receivers:
                    listener.settimeout(max(0.001, deadline - time.monotonic()))
                    one = listener.accept()[0]
                    if _peer_user(one) not in (0, os.getuid()):  # an abstract name has no permissions of its own
                        one.close()
                        continue
                    accepted.append(one)
                return cls(accepted)
            except TimeoutError as error:
                raise TransferError(
                    f"{len(accepted)} of {receivers} receivers connected to {name!r} within {timeout:g} s"
                ) from error
            finally:
                _close(accepted)  # duplicated by now, or of no use

    def lay_out(self, slots: int, nbytes: int) -> tuple[list[torch.Tensor], bytes]:
        total = self._arena.resize(slots, nbytes)
        stride = total // slots
        return [self._arena.view(slot * stride, nbytes) for slot in range(slots)], msgspec.msgpack.encode(_Ticket(stride, total))

    def push(self, slot: int, nbytes: int) -> Moving | None:
        del slot, nbytes  # written where it is read
        return None

    def close(self) -> None:
        super().close()
        self._arena.close()


class MemoryReceiver(LinkedReceiver):
    """A receiver's end: the other end of the socket that the sender has. ``timeout``: seconds to wait for the sender's memory."""

    def __init__(self, one: HasFileno, *, timeout: float = 60.0) -> None:
        ours = _stream_socket(one)
        try:
            self._arena = Arena(_received_memory(ours, timeout))
        except BaseException:
            ours.close()
            raise
        self._ticket = _Ticket(0, 0)
        super().__init__([ours])

    @classmethod
    def connect(cls, name: str, *, timeout: float = 60.0) -> MemoryReceiver:
        """Connect to the sender that listens at ``name``; it may start to within ``timeout`` seconds. ``TransferError`` after."""
        deadline = time.monotonic() + timeout
        while True:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as one:
                try:
                    one.connect(_address(name))
                except OSError as error:
                    if time.monotonic() >= deadline:
                        raise TransferError(f"no sender listens at {name!r} within {timeout:g} s: {error}") from error
                else:
                    return cls(one, timeout=max(0.0, deadline - time.monotonic()))
            time.sleep(_RETRY)

    def open(self, ticket: bytes, slots: int, nbytes: int) -> None:
        try:
            self._ticket = msgspec.msgpack.decode(ticket, type=_Ticket)
        except msgspec.MsgspecError as error:
            raise TransferError(f"the sender's memory is described by {len(ticket)} bytes that are no ticket: {error}") from error
        if self._ticket.stride < nbytes or self._ticket.total < slots * self._ticket.stride:
            raise TransferError(f"{slots} slots of {nbytes} bytes do not fit into {self._ticket}")
        self._arena.attach(self._ticket.total)

    def pull(self, slot: int, nbytes: int) -> Moving | None:
        del slot, nbytes
        return None

    def view(self, slot: int, nbytes: int) -> torch.Tensor:
        return self._arena.view(slot * self._ticket.stride, nbytes)

    def close(self) -> None:
        super().close()
        self._arena.close()


def memory_pair(receivers: int = 1) -> tuple[list[socket.socket], list[socket.socket]]:
    """Sockets for a sender and its receivers that are started from here: pass the second's file descriptors on."""
    pairs = [socket.socketpair() for _ in range(receivers)]
    return [ours for ours, _ in pairs], [theirs for _, theirs in pairs]


def _address(name: str) -> bytes:
    """The name in the abstract namespace of Unix sockets, which leaves no file."""
    return b"\0rollout-core/" + name.encode()


def _stream_socket(one: HasFileno) -> socket.socket:
    ours = socket.socket(fileno=os.dup(one.fileno()))
    if ours.family != socket.AF_UNIX or ours.type != socket.SOCK_STREAM:
        ours.close()
        raise TransferError(f"{one!r} is no Unix stream socket; pass one end of socket.socketpair() or of a duplex Pipe()")
    return ours


def _peer_user(one: socket.socket) -> int:
    """The user id of the process at the other end (SO_PEERCRED, unix(7))."""
    credentials: tuple[Any, ...] = struct.unpack("3i", one.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    return int(credentials[1])


def _received_memory(one: socket.socket, timeout: float) -> int:
    """The descriptor of the memory that the sender sends first of all."""
    poll = select.poll()
    poll.register(one, select.POLLIN)
    if not poll.poll(timeout * 1000):
        raise TransferError(f"the sender gave no shared memory within {timeout:g} s")
    try:
        greeting, descriptors, _, _ = socket.recv_fds(one, len(_GREETING), 1)
    except OSError as error:
        raise TransferError(f"the sender gave no shared memory: {error}") from error
    if greeting != _GREETING or len(descriptors) != 1:
        for descriptor in descriptors:
            os.close(descriptor)
        words = f"began with {greeting!r}" if greeting else "is gone"
        raise TransferError(f"the sender gave no shared memory: it {words}")
    return descriptors[0]


def _close(sockets: Sequence[socket.socket]) -> None:
    for one in sockets:
        one.close()
