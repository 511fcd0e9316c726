"""Slots as plain tensors, for carriers whose ends do not share other memory; and how slots in shared memory are described."""

from __future__ import annotations

import msgspec
import torch

from rollout_core.errors import TransferError


def make_slots(held: list[torch.Tensor], slots: int, nbytes: int, device: torch.device | str) -> list[torch.Tensor]:
    """``slots`` tensors, 1-d uint8 of ``nbytes``: those held if they are of this size; else they are let go of first.
    ``TransferError`` if the memory cannot be had."""
    if [slot.numel() for slot in held] == [nbytes] * slots:
        return held
    held.clear()
    try:
        return [torch.empty(nbytes, dtype=torch.uint8, device=device) for _ in range(slots)]
    except RuntimeError as error:  # out of memory, on the CPU too
        raise TransferError(f"{slots} slots of {nbytes} bytes cannot be had on {device}: {error}") from error


class Ticket(msgspec.Struct, frozen=True, array_like=True):
    """Where a receiver finds the sender's slots in memory that both reach."""

    stride: int  # bytes from slot to slot
    total: int  # bytes of the memory
    handle: bytes = b""  # what it is opened by, if not by a descriptor


def read_ticket(data: bytes, slots: int, nbytes: int) -> Ticket:
    """``TransferError`` if these are no ticket, or it has no room for ``slots`` slots of ``nbytes`` bytes."""
    try:
        ticket = msgspec.msgpack.decode(data, type=Ticket)
    except msgspec.MsgspecError as error:
        raise TransferError(f"the sender's memory is described by {len(data)} bytes that are no ticket: {error}") from error
    if ticket.stride < nbytes or ticket.total < slots * ticket.stride:
        raise TransferError(
            f"{slots} slots of {nbytes} bytes do not fit into the sender's {ticket.total} bytes in steps of {ticket.stride}"
        )
    return ticket
