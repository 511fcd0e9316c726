"""What a carrier does: it carries messages, and moves the bytes of slots. All thinking is done by the protocol.

A carrier has two kinds of ends: one for the sender, one for each receiver. An end serves one thread, one update after the other. It
never waits longer than it is told to, and reports the other side's end as soon as it can know of it. docs/transfer.md writes one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeAlias

import torch

from rollout_core.errors import TransferError

#: A move of bytes under way: True once this end's part is over, at once either way. Raises what went wrong. Asked again until
#: either happens.
Moving: TypeAlias = Callable[[], bool]


class SenderEnd(Protocol):
    """The sender's end."""

    #: Version of the weights of the last update that was committed, 0 at first. ``send`` keeps it.
    version: int

    @property
    def receivers(self) -> int:
        """How many receivers there are; they are numbered from 0."""
        ...

    @property
    def rendezvous(self) -> bool:
        """Whether both ends take part in moving a bucket, as in a collective: each ``push`` is then met by a ``pull`` of every
        receiver, in one order. If not, what ``push`` has finished with can be read for as long as the slot is lent."""
        ...

    def lay_out(self, slots: int, nbytes: int) -> tuple[list[torch.Tensor], bytes]:
        """Make ``slots`` buffers, 1-d contiguous uint8 of ``nbytes`` each, for the updates from here on, and whatever tells a
        receiver how to reach them. Earlier buffers are not used any more. ``TransferError`` if the memory cannot be had."""
        ...

    def post(self, receiver: int, message: bytes) -> None:
        """Send a message, whole and in order, without waiting for anybody: what cannot leave at once goes out while this end polls.
        ``TransferError`` if that receiver is known to be gone, or this end closed."""
        ...

    def poll(self, seconds: float | None) -> list[tuple[int, bytes | TransferError]]:
        """Messages that have come, each with its receiver; waits for the first at most ``seconds`` (None: as long as it takes). In
        place of a message a ``TransferError``, once: that receiver is gone, or speaks nonsense. After this end's own ``close`` it
        raises one."""
        ...

    def push(self, slot: int, nbytes: int) -> Moving | None:
        """Move the first ``nbytes`` of a slot to all receivers. None if that is done already."""
        ...

    def close(self) -> None:
        """Let go of everything, also in the middle of a move. Messages that have not left may be lost. A second call is
        harmless."""
        ...


class ReceiverEnd(Protocol):
    """A receiver's end."""

    #: Version of the weights of the last update that was committed, 0 at first. ``receive`` keeps it.
    version: int

    def open(self, ticket: bytes, slots: int, nbytes: int) -> None:
        """Reach the sender's slots, by what its ``lay_out`` made. ``TransferError`` if that cannot be."""
        ...

    def post(self, message: bytes) -> None:
        """Send a message, as ``SenderEnd.post``."""
        ...

    def poll(self, seconds: float | None) -> list[bytes | TransferError]:
        """Messages that have come, as ``SenderEnd.poll``."""
        ...

    def pull(self, slot: int, nbytes: int) -> Moving | None:
        """Get the first ``nbytes`` of a slot. None if they are here already."""
        ...

    def view(self, slot: int, nbytes: int) -> torch.Tensor:
        """What was pulled, as a 1-d contiguous uint8 tensor. It is read until the slot is given back, and not after; it can be read
        also when the sender has closed its end."""
        ...

    def close(self) -> None:
        """Let go of everything, also in the middle of a move. A second call is harmless."""
        ...
