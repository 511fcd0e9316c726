"""Buffers for buckets, used again as soon as nobody holds a view of them."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Final, TypeAlias

import numpy as np
import torch

#: Called with a size in bytes; returns a 1-d contiguous uint8 tensor of exactly that size, whose memory nobody else uses.
Allocate: TypeAlias = Callable[[int], torch.Tensor]
#: Every view of a slot has to start at a multiple of its itemsize in memory; 64 also keeps vector loads within cache lines.
BASE_ALIGN: Final = 64
_IDLE: Final = 2  # idle buffers worth keeping: one being filled while the last is being read


class BufferPool:
    """CPU buffers that come back by themselves.

    A buffer is free again when the last tensor on its storage is gone, so a caller who keeps the buckets of a round simply makes
    the pool grow, and one who lets go of each makes it stay at the size of what is in flight.
    """

    def __init__(self) -> None:
        self._buffers: list[tuple[np.ndarray[Any, Any], weakref.ref[np.ndarray[Any, Any]]]] = []

    def take(self, nbytes: int, device: torch.device, *, room: int = 0) -> torch.Tensor:
        """A buffer of ``nbytes``, with ``room`` for more bytes when it is used again. Its content is undefined. On other devices
        than the CPU torch's own allocator is the pool."""
        if device.type != "cpu":
            return torch.empty(nbytes, dtype=torch.uint8, device=device)
        idle = [memory for memory, lease in self._buffers if lease() is None]
        fitting = [memory for memory in idle if memory.nbytes >= nbytes]
        memory = fitting[0] if fitting else _aligned(max(nbytes, room))
        kept = [held for held in idle if held is not memory and held.nbytes >= nbytes][: _IDLE - 1]
        # torch keeps the array object that a tensor was made from for as long as any tensor uses the storage.
        lease = memory[:nbytes]
        self._buffers = [
            *((held, ref) for held, ref in self._buffers if ref() is not None),
            *((held, _GONE) for held in kept),
            (memory, weakref.ref(lease)),
        ]
        return torch.from_numpy(lease)

    def trim(self, buffer: torch.Tensor, nbytes: int) -> torch.Tensor:
        """The first bytes of a buffer just taken, as a buffer of their own in its place. ``buffer`` must not be used after. What
        is not from this pool is sliced: its storage keeps its size."""
        for place, (memory, _) in enumerate(self._buffers):
            if memory.ctypes.data == buffer.data_ptr():
                lease = memory[:nbytes]
                self._buffers[place] = (memory, weakref.ref(lease))
                return torch.from_numpy(lease)
        return buffer[:nbytes]


def _aligned(nbytes: int) -> np.ndarray[Any, Any]:
    raw = np.empty(nbytes + BASE_ALIGN, dtype=np.uint8)
    start = -raw.ctypes.data % BASE_ALIGN
    return raw[start : start + nbytes]


_GONE: Final[weakref.ref[np.ndarray[Any, Any]]] = weakref.ref(np.empty(0))


def check_buffer(buffer: torch.Tensor, nbytes: int) -> torch.Tensor:
    """Raise ``ValueError`` unless an allocator returned what a bucket of ``nbytes`` needs."""
    fine = buffer.dtype is torch.uint8 and buffer.shape == (nbytes,) and buffer.is_contiguous()
    if not fine:
        raise ValueError(
            f"allocate({nbytes}) returned {buffer.dtype} of shape {list(buffer.shape)}; "
            f"it returns a contiguous 1-d torch.uint8 tensor of {nbytes} elements"
        )
    if buffer.storage_offset() % 16 or buffer.data_ptr() % 16:
        raise ValueError(f"allocate({nbytes}) returned memory that does not start at a multiple of 16 bytes")
    return buffer
