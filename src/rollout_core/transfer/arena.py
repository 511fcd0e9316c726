"""Shared memory without a name: it is freed by the kernel when the last process that has it open is gone, however it went."""

from __future__ import annotations

import mmap
import os
from typing import Final

import torch

from rollout_core.errors import TransferError

_SLOT_ALIGN: Final = 4096


class Arena:
    """A memfd cut into equal slots. The owner resizes it; the other side maps it by its file descriptor.

    A slot is handed out by ``lease`` and comes back by ``release``; a leased slot is never handed out again (clause T1).
    """

    def __init__(self, fd: int | None = None) -> None:
        self.fd = os.memfd_create("rollout-core-arena") if fd is None else fd
        self._map: mmap.mmap | None = None
        self._slot_nbytes = 0
        self._free: list[int] = []

    def resize(self, slots: int, slot_nbytes: int) -> int:
        """Make room for ``slots`` slots of at least ``slot_nbytes`` bytes; all are free. Returns the size in bytes."""
        self._slot_nbytes = max(1, -(-slot_nbytes // _SLOT_ALIGN)) * _SLOT_ALIGN
        total = slots * self._slot_nbytes
        self._map = None
        # Never made smaller: a tensor that somebody still holds would fault when read.
        os.ftruncate(self.fd, max(total, os.fstat(self.fd).st_size))
        self._map = mmap.mmap(self.fd, total)
        self._free = [slot * self._slot_nbytes for slot in reversed(range(slots))]
        return total

    def attach(self, nbytes: int) -> None:
        """Map what the owner made, on the other side."""
        actual = os.fstat(self.fd).st_size
        if actual < nbytes:
            raise TransferError(f"the shared memory has {actual} bytes, and the sender says {nbytes}")
        self._map = mmap.mmap(self.fd, nbytes)

    def view(self, offset: int, nbytes: int) -> torch.Tensor:
        """``nbytes`` of the memory as a 1-d uint8 tensor that both sides see. ``TransferError`` if that is out of bounds."""
        if self._map is None or offset < 0 or nbytes < 0 or offset + nbytes > len(self._map):
            raise TransferError(f"bytes {offset} to {offset + nbytes} are not in the shared memory")
        if nbytes == 0:  # torch.frombuffer refuses an empty range
            return torch.empty(0, dtype=torch.uint8)
        return torch.frombuffer(self._map, dtype=torch.uint8, offset=offset, count=nbytes)

    @property
    def has_free_slot(self) -> bool:
        return bool(self._free)

    def lease(self) -> int:
        """The offset of a free slot, no longer free."""
        return self._free.pop()

    def release(self, offset: int) -> None:
        self._free.append(offset)

    def vacate(self) -> None:
        """Give the memory back to the system; views that are left read zeros."""
        if self._map is not None:
            self._map.madvise(mmap.MADV_REMOVE)
        self._map = None

    def detach(self) -> None:
        """Let go of the mapping, on the other side."""
        self._map = None

    def close(self) -> None:
        self._map = None
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
