"""A carrier that is simple enough to be seen to be right, for mutants to be made of. It uses nothing of the carriers that ship.

Ends of one process leave messages in each other's mailbox. With rendezvous, a push lays a copy of the bytes into every receiver's
mailbox, and is over once each has pulled it into memory of its own.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Any

import torch

from rollout_core.errors import TransferError


class Mailbox:
    """What came for one end."""

    def __init__(self) -> None:
        self.condition = threading.Condition()
        self.items: deque[Any] = deque()

    def put(self, item: Any) -> None:
        with self.condition:
            self.items.append(item)
            self.condition.notify_all()

    def take(self, seconds: float | None) -> list[Any]:
        with self.condition:
            self.condition.wait_for(lambda: self.items, seconds)
            found = list(self.items)
            self.items.clear()
            return found


class ReferenceSender:
    """The sender's end. A mutant may have receivers' ends of another class."""

    rendezvous = True
    receiver: type[ReferenceReceiver]

    def __init__(self, receivers: int) -> None:
        self.version = 0
        self.mailbox = Mailbox()
        self.peers = [self.receiver(self, place) for place in range(receivers)]
        self.slots: list[torch.Tensor] = []
        self.closed = False

    @property
    def receivers(self) -> int:
        return len(self.peers)

    def lay_out(self, slots: int, nbytes: int) -> tuple[list[torch.Tensor], bytes]:
        try:
            self.slots = [torch.zeros(nbytes, dtype=torch.uint8) for _ in range(slots)]
        except (RuntimeError, MemoryError) as error:
            raise TransferError(f"{slots} slots of {nbytes} bytes cannot be had: {error}") from error
        return list(self.slots), b""

    def post(self, receiver: int, message: bytes) -> None:
        if self.closed or self.peers[receiver].closed:
            raise TransferError("the receiver is gone")
        self.peers[receiver].mailbox.put(bytes(message))

    def poll(self, seconds: float | None) -> list[tuple[int, bytes | TransferError]]:
        return self.mailbox.take(seconds)

    def push(self, slot: int, nbytes: int) -> Callable[[], bool] | None:
        parcels = [Parcel(self.slots[slot][:nbytes].clone()) for _ in self.peers]
        for peer, parcel in zip(self.peers, parcels, strict=True):
            peer.parcels.append(parcel)
        return lambda: all(parcel.taken for parcel in parcels)

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            for peer in self.peers:
                peer.mailbox.put(TransferError("the sender has closed"))


class Parcel:
    """The bytes of one push for one receiver."""

    def __init__(self, data: torch.Tensor) -> None:
        self.data = data
        self.taken = False


class ReferenceReceiver:
    """A receiver's end."""

    def __init__(self, sender: ReferenceSender, place: int) -> None:
        self.version = 0
        self.mailbox = Mailbox()
        self.parcels: deque[Parcel] = deque()
        self.slots: list[torch.Tensor] = []
        self.closed = False
        self.sender = sender
        self.place = place

    def open(self, ticket: bytes, slots: int, nbytes: int) -> None:
        self.parcels.clear()
        self.slots = [torch.zeros(nbytes, dtype=torch.uint8) for _ in range(slots)]

    def post(self, message: bytes) -> None:
        if self.closed or self.sender.closed:
            raise TransferError("the sender is gone")
        self.sender.mailbox.put((self.place, bytes(message)))

    def poll(self, seconds: float | None) -> list[bytes | TransferError]:
        return self.mailbox.take(seconds)

    def pull(self, slot: int, nbytes: int) -> Callable[[], bool] | None:
        waiting = True

        def is_over() -> bool:
            nonlocal waiting
            if waiting and self.parcels:
                parcel = self.parcels.popleft()
                self.keep(slot, parcel.data)
                parcel.taken, waiting = True, False
            return not waiting

        return is_over

    def keep(self, slot: int, data: torch.Tensor) -> None:
        """What came of a slot."""
        self.slots[slot][: data.numel()].copy_(data)

    def view(self, slot: int, nbytes: int) -> torch.Tensor:
        return self.slots[slot][:nbytes]

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self.sender.mailbox.put((self.place, TransferError("the receiver has closed")))


ReferenceSender.receiver = ReferenceReceiver


class ReferenceCarrier:
    """Makes them: ``ReferenceCarrier()(receivers)``. A mutant has other ends."""

    sender: type[ReferenceSender] = ReferenceSender

    def __call__(self, receivers: int) -> tuple[ReferenceSender, list[ReferenceReceiver]]:
        sender = self.sender(receivers)
        return sender, sender.peers
