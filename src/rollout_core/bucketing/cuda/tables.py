"""Where a bucket's bytes come from, as the kernels read it: block by block, by the kernel that is fastest for each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from rollout_core.bucketing.digest import BLOCK_NBYTES
from rollout_core.bucketing.placement import BucketLayout
from rollout_core.compiled.library import Integers

VECTOR = 16  # bytes of the widest access


@dataclass(frozen=True, slots=True)
class Aligned:
    """Blocks for ``kernels.gather_aligned``, on the device, all int32."""

    blocks: torch.Tensor
    ones: torch.Tensor
    others: torch.Tensor
    splits: torch.Tensor
    ends: torch.Tensor


@dataclass(frozen=True, slots=True)
class Whole:
    """Blocks for ``kernels.gather_whole``: int32 ``blocks``, int64 ``rows`` and ``begins`` in the bucket, and ``sources``, the
    addresses, which are made of the rows' bases."""

    blocks: torch.Tensor
    rows: torch.Tensor
    begins: torch.Tensor
    sources: torch.Tensor

    @classmethod
    def of(cls, device: torch.device, blocks: Integers, rows: Integers, bases: torch.Tensor) -> Whole:
        begins = on_device(device, blocks * BLOCK_NBYTES)
        on_rows = on_device(device, rows)
        return cls(_narrow(device, blocks), on_rows, begins, bases[on_rows] + begins)

    def moved(self, bases: torch.Tensor) -> Whole:
        """From other bases: what was launched before may still read those before."""
        return replace(self, sources=bases[self.rows] + self.begins)


@dataclass(frozen=True, slots=True)
class Shifted:
    """Blocks for ``kernels.gather_shifted``, int32."""

    blocks: torch.Tensor
    ones: torch.Tensor


@dataclass(frozen=True, slots=True)
class Parts:
    """Blocks for ``kernels.gather_parts``, int32."""

    blocks: torch.Tensor
    rows: torch.Tensor
    stops: torch.Tensor


class Order:
    """The current stream reads a table, and writes to it, after whichever stream wrote it last."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._ready: torch.cuda.Event | None = None
        self._stream: int | None = None

    def follow(self, tensors: Iterable[torch.Tensor]) -> None:
        """Call it before the current stream reads or writes the table, which is these tensors."""
        if self._ready is None:
            return
        stream = torch.cuda.current_stream(self._device)
        if stream.cuda_stream != self._stream:
            stream.wait_event(self._ready)
            for tensor in tensors:  # their memory is the other stream's, and not to be used again while this one reads it
                tensor.record_stream(stream)

    def written(self) -> None:
        """Call it once the current stream has written some of the table, after ``follow``."""
        if self._device.type == "cuda":
            stream = torch.cuda.current_stream(self._device)
            self._ready, self._stream = stream.record_event(), stream.cuda_stream


class PackTable:
    """The table of one bucket on one device. The blocks' part follows from the layout, and from which sources lie on a multiple
    of 16 bytes, and is made again only when that changes; the rows' part is one address each.

    The rows are the layout's slots that have bytes. A row's base is the address that byte 0 of the bucket would have if the row's
    memory went on to there.
    """

    def __init__(self, layout: BucketLayout, device: torch.device) -> None:
        slots = [slot for slot in layout.slots if slot.nbytes]
        self.nbytes = layout.nbytes
        self.device = device
        self._starts = np.fromiter((slot.offset for slot in slots), np.int64, len(slots))
        self._ends = np.fromiter((slot.end for slot in slots), np.int64, len(slots))
        self.row_starts, self.row_ends = on_device(device, self._starts), on_device(device, self._ends)
        self._blocks = _Blocks.of(self._starts, self._ends, layout.nbytes)
        self._known: Integers | None = None
        self._fit: npt.NDArray[np.bool_] | None = None
        self._order = Order(device)
        self.bases = self.row_starts  # until the first point()
        self.aligned: Aligned | None = None
        #: The aligned blocks once more, for who does not digest: whole ones of one row, and the others.
        self.whole: Whole | None = None
        self.joined: Aligned | None = None
        self.shifted: Shifted | None = None
        self.parts: Parts | None = None
        self._order.written()

    def point(self, addresses: Integers | Sequence[int]) -> bool:
        """Take in where each row's bytes lie now, in the slots' order; whether any of it is new. Nothing moves to the device
        otherwise."""
        bases = np.asarray(addresses, np.int64) - self._starts
        new = self._known is None or not np.array_equal(bases, self._known)
        self.use()
        if new:
            # A new tensor: kernels that were launched before may still read the last one.
            self._known, self.bases = bases, on_device(self.device, bases)
            fit = bases % VECTOR == 0
            if self._fit is None or not np.array_equal(fit, self._fit):
                self._fit = fit
                self._lay_out(fit)
            elif self.whole is not None:
                self.whole = self.whole.moved(self.bases)
            self._order.written()
        return new

    def use(self) -> None:
        """Before a kernel reads the table on the current stream, if ``point`` was not called there."""
        self._order.follow(self._tensors())

    def _tensors(self) -> Iterator[torch.Tensor]:
        yield from (self.row_starts, self.row_ends, self.bases)
        for part in (self.aligned, self.whole, self.joined, self.shifted, self.parts):
            if part is not None:
                yield from (getattr(part, name) for name in part.__slots__)

    def _lay_out(self, fit: npt.NDArray[np.bool_]) -> None:
        """Give each block to a kernel: in new tensors, too."""
        device, blocks = self.device, self._blocks
        aligned, shifted, parts = blocks.by_kernel(fit)
        self.aligned = self.whole = self.joined = self.shifted = self.parts = None
        if len(aligned):
            is_whole = (blocks.splits[aligned] * 4) == BLOCK_NBYTES
            whole, joined = aligned[is_whole], aligned[~is_whole]
            self.aligned = self._aligned(aligned)
            self.whole = Whole.of(device, whole, blocks.rows[whole], self.bases) if len(whole) else None
            self.joined = self._aligned(joined) if len(joined) else None
        if len(shifted):
            self.shifted = Shifted(_narrow(device, shifted), _narrow(device, blocks.rows[shifted]))
        if len(parts):
            columns = (parts, blocks.rows[parts], blocks.stops[parts])
            self.parts = Parts(*(_narrow(device, column) for column in columns))

    def _aligned(self, numbers: Integers) -> Aligned:
        blocks = self._blocks
        columns = (numbers, *(column[numbers] for column in (blocks.rows, blocks.lasts, blocks.splits, blocks.last_words)))
        return Aligned(*(_narrow(self.device, column) for column in columns))


@dataclass(frozen=True, slots=True)
class _Blocks:
    """Every block of a bucket, by its number: the rows that it meets (``rows`` to ``stops``, the last being ``lasts``), where the
    second row begins and where the bytes end in it (in words), and what its layout allows."""

    rows: Integers
    stops: Integers
    lasts: Integers
    splits: Integers
    last_words: Integers
    vectors: npt.NDArray[np.bool_]  # one row or two without a gap, on multiples of 16 bytes
    inside: npt.NDArray[np.bool_]  # within one row, with room on either side

    @classmethod
    def of(cls, starts: Integers, ends: Integers, nbytes: int) -> _Blocks:
        begins = np.arange(0, nbytes, BLOCK_NBYTES, dtype=np.int64)
        stop_bytes = np.minimum(begins + BLOCK_NBYTES, nbytes)
        rows = np.searchsorted(ends, begins, side="right")
        stops = np.searchsorted(starts, stop_bytes, side="left")
        last = np.maximum(stops - 1, rows)  # a bucket ends with a slot, so rows is one
        split = np.minimum(ends[rows], stop_bytes)
        full = (starts[rows] <= begins) & (ends[last] >= stop_bytes)
        two = (last == rows) | ((last == rows + 1) & (starts[last] == split))
        even = ((split | stop_bytes) % VECTOR) == 0
        inside = (last == rows) & (starts[rows] + 4 <= begins) & (begins + BLOCK_NBYTES + 4 <= ends[rows])
        words = (split - begins) // 4, (stop_bytes - begins) // 4
        return cls(rows, np.maximum(stops, rows), last, *words, full & two & even, inside)

    def by_kernel(self, fit: npt.NDArray[np.bool_]) -> tuple[Integers, Integers, Integers]:
        """The numbers of the blocks that are aligned, shifted, and in parts. ``fit``: which rows' bases are multiples of 16."""
        aligned = self.vectors & fit[self.rows] & fit[self.lasts]
        shifted = self.inside & ~aligned
        numbers = np.arange(len(self.rows), dtype=np.int64)
        return numbers[aligned], numbers[shifted], numbers[~aligned & ~shifted]


@dataclass(frozen=True, slots=True)
class Entries:
    """Blocks for one of the copying kernels: int64 ``starts`` in the source and ``targets``, int32 ``sizes``; and of which row each
    is, and where in it."""

    starts: torch.Tensor
    targets: torch.Tensor
    sizes: torch.Tensor
    rows: torch.Tensor
    places: torch.Tensor

    def moved(self, addresses: torch.Tensor) -> Entries:
        """To rows that are elsewhere: what was launched before may still read the targets of before."""
        return replace(self, targets=addresses[self.rows] + self.places)


class CopyTable:
    """Ranges of one piece of memory on a device and the addresses that they are copied to: rows of ``sizes`` bytes from byte
    ``starts`` on, cut into blocks."""

    def __init__(self, starts: Integers, sizes: Integers, device: torch.device) -> None:
        self.device = device
        self.source = 0  # until the first point()
        self._order = Order(device)
        self._starts, self._sizes = starts, sizes
        counts = -(-sizes // BLOCK_NBYTES)
        #: Whether rows are so small that half of a block is left over where they are copied.
        self.is_small = bool(sizes.sum() <= counts.sum() * (BLOCK_NBYTES // 2))
        self._rows = np.repeat(np.arange(len(sizes)), counts)
        self._places = (np.arange(len(self._rows)) - np.repeat(np.cumsum(counts) - counts, counts)) * BLOCK_NBYTES
        self._known: Integers | None = None
        self._fit: Integers | None = None
        self.aligned: Entries | None = None
        self.shifted: Entries | None = None
        self.parts: Entries | None = None

    def point(self, source: int, targets: Integers) -> bool:
        """Take in where the source and each row's target are; whether a target is new. Another source costs nothing: it is a number
        that the kernels are told."""
        self.source = source
        new = self._known is None or not np.array_equal(targets, self._known)
        fit = ((source + self._starts) % VECTOR == 0) + 2 * (targets % VECTOR == 0)
        other = self._fit is None or not np.array_equal(fit, self._fit)
        self._order.follow(self._tensors())
        if new or other:
            self._known, self._fit = targets, fit
            addresses = on_device(self.device, targets)
            if other:
                self._lay_out(fit, addresses)
            else:
                self.aligned, self.shifted, self.parts = (
                    some and some.moved(addresses) for some in (self.aligned, self.shifted, self.parts)
                )
            self._order.written()
        return new

    def _tensors(self) -> Iterator[torch.Tensor]:
        for some in (self.aligned, self.shifted, self.parts):
            if some is not None:
                yield from (getattr(some, name) for name in some.__slots__)

    def _lay_out(self, fit: Integers, addresses: torch.Tensor) -> None:
        left = self._sizes[self._rows] - self._places
        aligned = (fit[self._rows] == 3) & ((left >= BLOCK_NBYTES) | (left % VECTOR == 0))
        shifted = (fit[self._rows] == 2) & (left >= BLOCK_NBYTES + 4) & (self._places > 0)
        chosen = (aligned, shifted, ~aligned & ~shifted)
        self.aligned, self.shifted, self.parts = (self._entries(some, left, addresses) for some in chosen)

    def _entries(self, chosen: npt.NDArray[np.bool_], left: Integers, addresses: torch.Tensor) -> Entries | None:
        if not chosen.any():
            return None
        rows, places = self._rows[chosen], self._places[chosen]
        on_rows, on_places = on_device(self.device, rows), on_device(self.device, places)
        return Entries(
            starts=on_device(self.device, self._starts[rows] + places),
            targets=addresses[on_rows] + on_places,
            sizes=_narrow(self.device, np.minimum(left[chosen], BLOCK_NBYTES)),
            rows=on_rows,
            places=on_places,
        )


def _narrow(device: torch.device, array: Integers) -> torch.Tensor:
    return on_device(device, array.astype(np.int32))


def on_device(device: torch.device, array: npt.NDArray[np.generic]) -> torch.Tensor:
    """On the device; the array may be changed or dropped then. By way of pinned memory, for a GPU: from other memory torch waits
    for the copy, and so for all that the stream has to do before it."""
    here = torch.from_numpy(np.ascontiguousarray(array))
    staged = torch.empty(here.shape, dtype=here.dtype, device="cpu", pin_memory=device.type == "cuda").copy_(here)
    return staged.to(device, non_blocking=True, copy=True)
