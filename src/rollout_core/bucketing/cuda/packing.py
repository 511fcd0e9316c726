"""A bucket filled in one launch from tensors on its own GPU; the rest of its tensors by torch before."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter, eq, is_
from typing import Final

import numpy as np
import torch

from rollout_core.bucketing.cuda import launching
from rollout_core.bucketing.cuda.tables import PackTable
from rollout_core.bucketing.digest import LaterLanes
from rollout_core.bucketing.finding import MANY, Finder
from rollout_core.bucketing.looks import Alike, alike_to
from rollout_core.bucketing.placement import BucketLayout, Slot
from rollout_core.bucketing.tensors import PLAIN_TYPES, check_memory
from rollout_core.compiled.library import LOW, Integers

_DTYPE: Final = attrgetter("dtype")
_SHAPE: Final = attrgetter("shape")


class Filling:
    """How one bucket of a plan is filled, round after round. Of the sources it keeps addresses, and nothing else.

    Pieces of split tensors are filled from the bytes of the whole tensor (1-d uint8), other slots from tensors of their spec.
    """

    def __init__(self, layout: BucketLayout, device: torch.device) -> None:
        self.layout = layout
        self.device = device
        # get_device() is the quicker question, and -1 for whatever is on no GPU.
        self._where: Callable[[torch.Tensor], object] = attrgetter("device") if device.index is None else torch.Tensor.get_device
        self._here = device if device.index is None else device.index
        #: Whether all tensors of the last time were read where they lie.
        self.repeatable = False
        self._table = PackTable(layout, device)
        self._slots = [slot for slot in layout.slots if slot.nbytes]
        self._places = [place for place, slot in enumerate(layout.slots) if slot.nbytes]
        self._empty = [(place, slot) for place, slot in enumerate(layout.slots) if not slot.nbytes]
        self._dtypes = tuple(torch.uint8 if slot.is_piece else slot.spec.dtype for slot in self._slots)
        self._shapes = tuple((slot.spec.nbytes,) if slot.is_piece else slot.spec.shape for slot in self._slots)
        starts = [slot.start for slot in self._slots]
        self._starts = np.array(starts, np.int64) if any(starts) else None
        self._finder: Finder | None = None
        self._may_find = len(self._slots) >= MANY
        self._complex = any(dtype.is_complex for dtype in self._dtypes)
        self._alike: Alike | None = None  # to tensors that were all found plain
        self._was_plain = False

    def fill(
        self, buffer: torch.Tensor, tensors: Sequence[torch.Tensor], write: Callable[[Slot, torch.Tensor], None], *, digest: bool
    ) -> LaterLanes | None:
        """Fill ``buffer``, the bucket's, from ``tensors``, one for each slot. ``write`` puts into its place what is not a plain
        contiguous tensor of the slot's spec on this device, or raises. Returns the lanes of the digest, if asked for."""
        self.repeatable = False
        rows = tensors if isinstance(tensors, list) else list(tensors)
        if self._empty:
            rows = [tensors[place] for place in self._places]
            for place, slot in self._empty:
                write(slot, tensors[place])
        addresses = self._plain_addresses(rows)
        plain = addresses is not None
        if addresses is None:
            addresses = self._mixed_addresses(buffer, rows, write)
        self._table.point(addresses)
        self.repeatable = plain
        return launching.gather(self._table, buffer, digest=digest)

    def repeat(self, buffer: torch.Tensor, *, digest: bool) -> LaterLanes | None:
        """``fill`` from the tensors of the last time, which have not moved; only if ``repeatable``."""
        self._table.use()
        return launching.gather(self._table, buffer, digest=digest)

    def _plain_addresses(self, rows: list[torch.Tensor]) -> Integers | None:
        """Of all rows, if each is just memory of this device, laid out as the spec says: the common answer, found without Python
        for each tensor."""
        if self._may_find and self._was_plain:  # not in the first round, which may be the last: it takes longer than it saves once
            self._may_find, self._finder = False, Finder.of(self._dtypes, self._shapes, self.device)
        found = self._finder.addresses(rows) if self._finder is not None else None
        if found is None and self._all_plain(rows):
            found = np.fromiter(map(torch.Tensor.data_ptr, rows), np.int64, len(rows))
            for place in np.flatnonzero(found < LOW):
                check_memory(self._slots[place].name, rows[place])
        return found if found is None or self._starts is None else found + self._starts

    def _all_plain(self, rows: Sequence[torch.Tensor]) -> bool:
        """In one call, once two rounds have found it."""
        if self._alike is not None:
            if self._alike(*rows):
                return True
            self._alike, self._was_plain = None, False
        plain = self._are_plain(rows)
        if plain and self._was_plain:
            self._alike = alike_to(rows)
        self._was_plain = plain
        return plain

    def _mixed_addresses(
        self, buffer: torch.Tensor, rows: Sequence[torch.Tensor], write: Callable[[Slot, torch.Tensor], None]
    ) -> Integers:
        """Odd tensors are written first, and the kernel, which reads what it digests, finds them where they are to be."""
        base = buffer.data_ptr()
        addresses = np.empty(len(rows), np.int64)
        for place, (slot, tensor) in enumerate(zip(self._slots, rows, strict=True)):
            if self._is_plain(place, tensor):
                check_memory(slot.name, tensor)
                addresses[place] = tensor.data_ptr() + slot.start
            else:
                write(slot, tensor)
                addresses[place] = base + slot.offset
        return addresses

    def _are_plain(self, rows: Sequence[torch.Tensor]) -> bool:
        """``_is_plain`` of all, by maps over C attributes."""
        try:
            return (
                PLAIN_TYPES.issuperset(map(type, rows))
                and all(map(is_, map(_DTYPE, rows), self._dtypes))
                and all(map(eq, map(_SHAPE, rows), self._shapes))
                and {self._here}.issuperset(map(self._where, rows))
                and all(map(torch.Tensor.is_contiguous, rows))
                and not any(map(torch.Tensor.is_neg, rows))
                and not (self._complex and any(map(torch.Tensor.is_conj, rows)))
            )
        except RuntimeError:  # a sparse or nested tensor, which has no strides or no shape
            return False

    def _is_plain(self, place: int, tensor: torch.Tensor) -> bool:
        return (
            type(tensor) in PLAIN_TYPES
            and tensor.layout is torch.strided
            and not tensor.is_nested
            and tensor.dtype is self._dtypes[place]
            and tuple(tensor.shape) == self._shapes[place]
            and tensor.device == self.device
            and tensor.is_contiguous()
            and not tensor.is_neg()
            and not tensor.is_conj()
        )
