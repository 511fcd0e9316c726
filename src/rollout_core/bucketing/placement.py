"""Where each tensor goes: the one algorithm behind plans and streams, on sizes alone.

Greedy in stream order, as every peer does it: a tensor that does not fit what is left of the open bucket starts the next one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final, Literal, TypeAlias, get_args

import msgspec

from rollout_core.bucketing.specs import MAX_NBYTES, TensorSpec
from rollout_core.errors import CapacityError

Oversize: TypeAlias = Literal["split", "own", "error"]
Order: TypeAlias = Literal["given", "packed"]

_MAX_ALIGN: Final = 1 << 20
#: More pieces than this is a capacity in the wrong unit, and planning them would fill the memory with slots.
_MAX_PIECES: Final = 1 << 22


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """How a plan is made. Raises ``CapacityError`` or ``ValueError`` when made with values outside these.

    ``capacity``: bytes that no bucket exceeds, a positive int. ``oversize``: what becomes of a tensor larger than that:
    ``split`` into pieces, a bucket of its ``own`` over capacity, or an ``error``. ``order``: slots lie in the ``given`` order, or
    ``packed`` within each bucket by descending itemsize, which needs no padding while ``align`` is 1. ``align``: every offset is
    a multiple of this too, a power of two.
    """

    capacity: int
    oversize: Oversize = "split"
    order: Order = "given"
    align: int = 1

    def __post_init__(self) -> None:
        if type(self.capacity) is not int or not 0 < self.capacity <= MAX_NBYTES:
            raise CapacityError(
                f"capacity is {self.capacity!r} ({type(self.capacity).__name__}); it is a whole number of bytes, "
                "at least 1, for example 512 << 20"
            )
        if self.oversize not in get_args(Oversize):
            raise ValueError(f"oversize is {self.oversize!r}; it is one of {', '.join(get_args(Oversize))}")
        if self.order not in get_args(Order):
            raise ValueError(f"order is {self.order!r}; it is one of {', '.join(get_args(Order))}")
        if type(self.align) is not int or not 0 < self.align <= _MAX_ALIGN or self.align & (self.align - 1):
            raise ValueError(f"align is {self.align!r}; it is a power of two from 1 to {_MAX_ALIGN}")


class Slot(msgspec.Struct, frozen=True, gc=False):
    """The place of one tensor, or of one piece of a split tensor, in its bucket.

    ``offset`` and ``nbytes`` say where in the bucket; ``start`` is the first byte of the tensor that lies here (0 unless split).
    """

    spec: TensorSpec
    offset: int
    nbytes: int
    start: int = 0

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def end(self) -> int:
        return self.offset + self.nbytes

    @property
    def is_piece(self) -> bool:
        """Whether the tensor is split and this slot holds only part of it."""
        return self.nbytes != self.spec.nbytes

    @property
    def is_tail(self) -> bool:
        """Whether the tensor is complete with this slot."""
        return self.start + self.nbytes == self.spec.nbytes


class BucketLayout(msgspec.Struct, frozen=True):
    """The slots of one bucket by offset. ``nbytes`` is its size, padding between slots included; there is none at the end."""

    index: int
    nbytes: int
    slots: tuple[Slot, ...]

    @property
    def padding(self) -> int:
        return self.nbytes - sum(slot.nbytes for slot in self.slots)

    def gaps(self) -> list[tuple[int, int]]:
        """The padding as (offset, nbytes), by offset."""
        gaps = []
        end = 0
        for slot in self.slots:
            if slot.offset > end:
                gaps.append((end, slot.offset - end))
            end = slot.end
        return gaps


def alignment(spec: TensorSpec, align: int) -> int:
    """The number that divides every offset of this tensor: both are powers of two, so the larger one serves both."""
    return max(spec.dtype.itemsize, align)


def align_up(offset: int, step: int) -> int:
    """The first multiple of ``step``, a power of two, at or after ``offset``."""
    return (offset + step - 1) & -step


class Filler:
    """The open bucket and the rule that fills it. ``add`` returns the layouts that a unit completed, in order."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self._index = 0
        self._reset()

    def _reset(self) -> None:
        self._members: list[Slot] = []  # offsets are final in given order, provisional in packed order
        self._end = 0
        self._rounded = 0  # packed: bytes with every slot rounded up to its alignment
        self._last: Slot | None = None  # packed: the slot that will lie last, whose rounding is not needed

    def add(self, unit: list[TensorSpec]) -> list[BucketLayout]:
        """Place one tensor, or a group that must share a bucket."""
        if self._fits(unit):
            return []
        closed = self._close()
        if not self._fits(unit):
            closed += self._oversize(unit)
        return closed

    @property
    def open_slots(self) -> Sequence[Slot]:
        """The slots of the open bucket so far; in given order they are final."""
        return self._members

    def finish(self) -> list[BucketLayout]:
        """The open bucket, if anything is in it."""
        return self._close()

    def _fits(self, unit: list[TensorSpec]) -> bool:
        """Place the unit in the open bucket if it fits there."""
        return self._place_given(unit) if self.options.order == "given" else self._place_packed(unit)

    def _place_given(self, unit: list[TensorSpec]) -> bool:
        align, end = self.options.align, self._end
        slots = []
        for spec in unit:
            offset = align_up(end, alignment(spec, align))
            nbytes = spec.nbytes
            end = offset + nbytes
            slots.append(Slot(spec, offset, nbytes))
        if end > self.options.capacity:
            return False
        self._members += slots
        self._end = end
        return True

    def _place_packed(self, unit: list[TensorSpec]) -> bool:
        """By descending itemsize every slot's rounded size is a multiple of the next one's alignment, so the end of the bucket is
        the sum of the rounded sizes, less the rounding of whichever slot lies last."""
        align, rounded, last = self.options.align, self._rounded, self._last
        slots = [Slot(spec, 0, spec.nbytes) for spec in unit]
        for slot in slots:
            rounded += align_up(slot.nbytes, alignment(slot.spec, align))
            if last is None or slot.spec.dtype.itemsize <= last.spec.dtype.itemsize:
                last = slot
        assert last is not None  # a unit is never empty
        end = rounded - align_up(last.nbytes, alignment(last.spec, align)) + last.nbytes
        if end > self.options.capacity:
            return False
        self._members += slots
        self._end, self._rounded, self._last = end, rounded, last
        return True

    def _close(self) -> list[BucketLayout]:
        if not self._members:
            return []
        slots = self._members if self.options.order == "given" else self._packed_slots()
        layout = BucketLayout(self._index, self._end, tuple(slots))
        self._index += 1
        self._reset()
        return [layout]

    def _packed_slots(self) -> list[Slot]:
        end = 0
        slots = []
        for slot in sorted(self._members, key=lambda slot: -slot.spec.dtype.itemsize):
            offset = align_up(end, alignment(slot.spec, self.options.align))
            slots.append(Slot(slot.spec, offset, slot.nbytes, slot.start))
            end = offset + slot.nbytes
        return slots

    def _oversize(self, unit: list[TensorSpec]) -> list[BucketLayout]:
        """A unit larger than an empty bucket, by the declared policy."""
        capacity, policy = self.options.capacity, self.options.oversize
        if len(unit) > 1:
            names = ", ".join(repr(spec.name) for spec in unit[:4]) + (", ..." if len(unit) > 4 else "")
            raise CapacityError(
                f"the group ({names}) needs {_extent(unit, self.options.align)} bytes in one bucket, "
                f"and the capacity is {capacity}; raise the capacity or ungroup it"
            )
        (spec,) = unit
        if policy == "error":
            raise CapacityError(
                f"tensor {spec.name!r} ({spec}, {spec.nbytes} bytes) is larger than the capacity of {capacity} bytes; "
                "raise the capacity or pass oversize='split' or 'own'"
            )
        if policy == "own":
            self._index += 1
            return [BucketLayout(self._index - 1, spec.nbytes, (Slot(spec, 0, spec.nbytes),))]
        return self._split(spec)

    def _split(self, spec: TensorSpec) -> list[BucketLayout]:
        """Full buckets of the tensor alone; its tail opens a bucket that the next tensors share."""
        itemsize = spec.dtype.itemsize
        step = self.options.capacity // itemsize * itemsize
        if step == 0:
            raise CapacityError(
                f"capacity is {self.options.capacity} bytes, and one element of tensor {spec.name!r} ({spec}) has {itemsize}; "
                "raise the capacity to at least that"
            )
        full = (spec.nbytes - 1) // step
        if full >= _MAX_PIECES:
            raise CapacityError(
                f"tensor {spec.name!r} ({spec}, {spec.nbytes} bytes) would be split into {full + 1} pieces by a capacity of "
                f"{self.options.capacity} bytes; raise the capacity"
            )
        layouts = [BucketLayout(self._index + i, step, (Slot(spec, 0, step, i * step),)) for i in range(full)]
        self._index += full
        tail = Slot(spec, 0, spec.nbytes - full * step, full * step)
        self._members.append(tail)
        self._end = tail.nbytes
        self._rounded, self._last = align_up(tail.nbytes, alignment(spec, self.options.align)), tail
        return layouts


def _extent(unit: list[TensorSpec], align: int) -> int:
    """Bytes that a group needs in a bucket of its own, in given order."""
    end = 0
    for spec in unit:
        end = align_up(end, alignment(spec, align)) + math.prod(spec.shape) * spec.dtype.itemsize
    return end
