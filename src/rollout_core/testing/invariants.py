"""Invariants of a bucket's layout: each a small function that says what is wrong, or None. Slots are (name, offset, nbytes) as a
packer reports them; sizes are bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TypeAlias

import torch

from rollout_core.testing.cases import TensorCase

SlotRow: TypeAlias = tuple[str, int, int]


def within_capacity(nbytes: Sequence[int], capacity: int) -> str | None:
    """B2: no bucket is larger than the capacity."""
    for index, size in enumerate(nbytes):
        if size > capacity:
            return f"bucket {index} has {size} bytes (capacity: {capacity})"
    return None


def aligned(buckets: Sequence[Sequence[SlotRow]], cases: Mapping[str, TensorCase], align: int = 1) -> str | None:
    """B3: every slot's offset is a multiple of its dtype's itemsize, and of a larger ``align`` if the packer declares one."""
    for index, slots in enumerate(buckets):
        before = ""
        for name, offset, _nbytes in slots:
            case = cases.get(name)
            if case is None:
                continue
            step = max(case.torch_dtype.itemsize, align)
            if offset % step:
                return f"bucket {index}: slot {before}{case} at offset {offset}: not a multiple of {step}"
            before = f"{case} at offset {offset}, then "
    return None


def disjoint(buckets: Sequence[Sequence[SlotRow]]) -> str | None:
    """B4: no two slots of a bucket share a byte."""
    for index, slots in enumerate(buckets):
        filled = [slot for slot in sorted(slots, key=lambda slot: slot[1]) if slot[2]]
        for (name, offset, nbytes), (other, start, _size) in pairwise(filled):
            if start < offset + nbytes:
                return (
                    f"bucket {index}: slot {name!r} takes bytes {offset} to {offset + nbytes}, and slot {other!r} starts at {start}"
                )
    return None


def in_bounds(buckets: Sequence[Sequence[SlotRow]], nbytes: Sequence[int]) -> str | None:
    """B4: no slot begins before its bucket or ends after it."""
    for index, (slots, size) in enumerate(zip(buckets, nbytes, strict=True)):
        for name, offset, length in slots:
            if offset < 0 or length < 0 or offset + length > size:
                return f"bucket {index} has {size} bytes, and slot {name!r} takes bytes {offset} to {offset + length}"
    return None


def covered(buckets: Sequence[Sequence[SlotRow]], nbytes: Sequence[int], align: int) -> str | None:
    """B4: slots and padding cover a bucket exactly: no gap is wider than alignment asks for, and nothing follows the last slot
    but padding to ``align`` bytes."""
    for index, (slots, size) in enumerate(zip(buckets, nbytes, strict=True)):
        end = 0
        for name, offset, length in sorted(slots, key=lambda slot: (slot[1], slot[2])):
            if offset - end >= align:
                return f"bucket {index}: {offset - end} bytes before slot {name!r} belong to nothing (alignment: {align})"
            end = max(end, offset + length)
        if size - end >= align:
            return f"bucket {index} has {size} bytes, and its last slot ends at {end} (alignment: {align})"
    return None


def zero_padding(index: int, buffer: torch.Tensor, slots: Sequence[SlotRow]) -> str | None:
    """B4: bytes that belong to no slot are zero."""
    taken = bytearray(buffer.numel())
    for _name, offset, nbytes in slots:
        taken[offset : offset + nbytes] = b"\x01" * nbytes
    for place, (used, byte) in enumerate(zip(taken, buffer.tolist(), strict=True)):
        if not used and byte:
            return f"bucket {index}: byte {place} is padding and has the value {byte} (model: 0)"
    return None
