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
        self.fd = -1  # in case making it fails
        self._map: mmap.mmap | None = None
        self._free: list[int] = []
        self._leased: set[int] = set()
        self.fd = os.memfd_create("rollout-core-arena") if fd is None else fd

    def resize(self, slots: int, slot_nbytes: int) -> int:
        """Make room for ``slots`` slots of at least ``slot_nbytes`` bytes; all are free. Returns the size in bytes."""
        if slots < 1 or slot_nbytes < 0:
            raise TransferError(f"{slots} slots of {slot_nbytes} bytes were asked for; at least one slot is needed")
        size = max(1, -(-slot_nbytes // _SLOT_ALIGN)) * _SLOT_ALIGN
        kept = self._map if self._map is not None and len(self._map) == slots * size else None
        self.detach()
        try:
            # Never made smaller: a tensor that somebody still holds would fault when read.
            os.ftruncate(self.fd, max(slots * size, os.fstat(self.fd).st_size))
            # A new mapping takes every page in anew, at its first touch.
            self._map = kept or mmap.mmap(self.fd, slots * size)
        except (OSError, OverflowError) as error:
            raise TransferError(f"{slots * size} bytes of shared memory cannot be had: {error}") from error
        self._free = [slot * size for slot in reversed(range(slots))]
        return slots * size

    def attach(self, nbytes: int) -> None:
        """Map what the owner made, on the other side."""
        actual = os.fstat(self.fd).st_size
        if not 0 < nbytes <= actual:
            raise TransferError(f"the shared memory has {actual} bytes, and the sender says {nbytes}")
        if self._map is None or len(self._map) != nbytes:
            try:
                self._map = mmap.mmap(self.fd, nbytes)
            except OSError as error:
                raise TransferError(f"{nbytes} bytes of shared memory cannot be reached: {error}") from error

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
        """The offset of a free slot, no longer free. ``TransferError`` if there is none."""
        if not self._free:
            raise TransferError(f"all {len(self._leased)} slots of the shared memory are in use")
        offset = self._free.pop()
        self._leased.add(offset)
        return offset

    def release(self, offset: int) -> None:
        """Take a slot back. ``TransferError`` if it is not leased: freed twice, it could be handed out twice."""
        if offset not in self._leased:
            raise TransferError(f"offset {offset} of the shared memory is not a slot in use, and cannot be released")
        self._leased.remove(offset)
        self._free.append(offset)

    def vacate(self) -> None:
        """Give all of the memory back to the system; views that are left read zeros."""
        self.detach()
        if self.fd >= 0 and os.fstat(self.fd).st_size:
            # Of the whole file: an earlier, larger size may have left pages behind the slots.
            with mmap.mmap(self.fd, 0) as whole:
                whole.madvise(mmap.MADV_REMOVE)

    def detach(self) -> None:
        """Let go of the mapping and its slots; views that are left stay readable."""
        self._map = None
        self._free.clear()
        self._leased.clear()

    def close(self) -> None:
        """Let go of everything. A second call is harmless."""
        self.detach()
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def __del__(self) -> None:
        self.close()
