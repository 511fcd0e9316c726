"""Slots as plain tensors, for carriers whose ends do not share other memory."""

from __future__ import annotations

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
