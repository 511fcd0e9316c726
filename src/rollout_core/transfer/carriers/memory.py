"""Between processes of one machine: slots in shared memory, messages over Unix sockets. The bytes are not copied on the way.

Nothing of it has a name in the file system: the memory is a memfd, sockets are pairs or of the abstract namespace (unix(7)). What
the processes leave, however they end, the kernel frees with the last of them.
"""

from __future__ import annotations

import os
import select
import socket
import time
from collections.abc import Callable, Sequence
from typing import Final

import msgspec
import torch

from rollout_core.errors import TransferError
from rollout_core.transfer.arena import Arena
from rollout_core.transfer.carriers import unix
from rollout_core.transfer.carriers.contract import Moving
from rollout_core.transfer.carriers.links import LinkedReceiver, LinkedSender
from rollout_core.transfer.carriers.slots import Ticket, read_ticket

_GREETING: Final = b"rollout-core memory 1"


class MemorySender(LinkedSender):
    """The sender's end. ``sockets``: for each receiver one end of a Unix stream socket pair, or of a duplex
    ``multiprocessing.Pipe()``, or its descriptor, that nothing else is sent over; it is duplicated: close your own, or the other
    side will not see this one's end.

    The memory is kept between updates. It has the size of the slots: two buckets, unless ``send`` is told otherwise.
    """

    rendezvous: Final = False

    def __init__(self, sockets: Sequence[unix.HasFileno | int]) -> None:
        ours = unix.stream_sockets(sockets)
        self._arena = Arena()
        try:
            for place, one in enumerate(ours):
                _send_memory(one, self._arena.fd, place)
        except BaseException:
            unix.close_all(ours)
            self._arena.close()
            raise
        super().__init__(ours)

    @classmethod
    def listen(
        cls, name: str, receivers: int = 1, *, timeout: float = 60.0, check: Callable[[], None] | None = None
    ) -> MemorySender:
        """Wait for ``receivers`` processes of the same user to ``MemoryReceiver.connect`` to ``name``: see ``unix.listen``."""
        return unix.joined(cls, unix.listen(name, receivers, timeout, check))

    def lay_out(self, slots: int, nbytes: int) -> tuple[list[torch.Tensor], bytes]:
        self._links.check_open()
        total = self._arena.resize(slots, nbytes)
        stride = total // slots
        return [self._arena.view(slot * stride, nbytes) for slot in range(slots)], msgspec.msgpack.encode(Ticket(stride, total))

    def push(self, slot: int, nbytes: int) -> Moving | None:
        del slot, nbytes  # written where it is read
        return None

    def close(self) -> None:
        super().close()
        self._arena.close()


class MemoryReceiver(LinkedReceiver):
    """A receiver's end: the other end of the socket that the sender has. ``timeout``: seconds to wait for the sender's memory."""

    def __init__(self, one: unix.HasFileno | int, *, timeout: float = 60.0) -> None:
        ours = unix.stream_socket(one)
        try:
            self._arena = Arena(_received_memory(ours, timeout))
        except BaseException:
            ours.close()
            raise
        self._ticket = Ticket(0, 0)
        super().__init__([ours])

    @classmethod
    def connect(cls, name: str, *, timeout: float = 60.0) -> MemoryReceiver:
        """Connect to the sender that listens at ``name``; it may start to within ``timeout`` seconds. ``TransferError`` after."""
        deadline = time.monotonic() + timeout
        with unix.connect(name, timeout) as one:
            return cls(one, timeout=max(0.0, deadline - time.monotonic()))

    def open(self, ticket: bytes, slots: int, nbytes: int) -> None:
        self._ticket = read_ticket(ticket, slots, nbytes)
        self._arena.attach(self._ticket.total)

    def view(self, slot: int, nbytes: int) -> torch.Tensor:
        return self._arena.view(slot * self._ticket.stride, nbytes)

    def close(self) -> None:
        super().close()
        self._arena.close()


def _send_memory(one: socket.socket, descriptor: int, receiver: int) -> None:
    try:
        socket.send_fds(one, [_GREETING], [descriptor])
    except OSError as error:
        raise TransferError(f"receiver {receiver} cannot be given the shared memory: {error}") from error


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
