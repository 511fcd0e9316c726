"""A bucket filled from many small tensors on the CPU. torch needs longer to find and call for each than to copy it."""

from __future__ import annotations

from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import numpy as np
import torch

from rollout_core.bucketing.copying import JOB, SMALL, all_do
from rollout_core.bucketing.finding import MANY, Finder
from rollout_core.bucketing.placement import BucketLayout, Slot
from rollout_core.bucketing.tensors import PLAIN_TYPES, was_freed
from rollout_core.compiled.library import Integers


@dataclass(frozen=True, slots=True)
class _Part:
    """Some neighbouring slots: their tensors, from ``start`` to ``stop``, are found and copied together."""

    start: int
    stop: int
    finder: Finder
    places: Integers
    sizes: Integers

    def fill(self, buffer: torch.Tensor, tensors: list[torch.Tensor]) -> bool:
        """Looks at tensors and buffer when it is called, which for a job may be late, and holds them until then."""
        found = self.finder.addresses(tensors)
        if found is None:
            return False
        self.finder.library.gather(found, self.places, self.sizes, buffer.data_ptr())
        return True


class Gathering:
    """How one bucket of a plan is filled, round after round. It keeps no tensor."""

    @classmethod
    def of(cls, layout: BucketLayout) -> Gathering | None:
        """Of a bucket of whole tensors. None if they are few, or large, which torch copies as well; and without compiled code."""
        slots = layout.slots
        is_small = len(slots) >= MANY and layout.nbytes < SMALL * len(slots)
        if not is_small or not all(0 < slot.nbytes < JOB for slot in slots):
            return None
        ends = np.cumsum([slot.nbytes for slot in slots])
        starts = dict.fromkeys(np.searchsorted(ends, np.arange(0, ends[-1], JOB), side="right").tolist())
        parts = [_part_of(slots, start, stop) for start, stop in pairwise([*starts, len(slots)])]
        found = [part for part in parts if part is not None]
        return cls(found) if len(found) == len(parts) else None

    def __init__(self, parts: list[_Part]) -> None:
        self._parts = parts

    def fill(self, buffer: torch.Tensor, tensors: list[torch.Tensor], executor: Executor | None) -> bool:
        """Fill ``buffer``, the bucket's, but for its padding, from ``tensors``, one for each slot. False, with the buffer
        undefined, if they are not all plain contiguous CPU tensors as planned, or the executor's jobs may be run elsewhere."""
        is_here = executor is None or isinstance(executor, ThreadPoolExecutor)
        if not is_here or type(buffer) not in PLAIN_TYPES or not buffer.is_cpu or was_freed(buffer):
            return False
        jobs = [partial(part.fill, buffer, tensors[part.start : part.stop]) for part in self._parts]
        if executor is None or len(jobs) == 1:
            return all(job() for job in jobs)
        return all_do(executor, jobs)


def _part_of(slots: tuple[Slot, ...], start: int, stop: int) -> _Part | None:
    some = slots[start:stop]
    finder = Finder.of([slot.spec.dtype for slot in some], [slot.spec.shape for slot in some], torch.device("cpu"))
    if finder is None:
        return None
    columns = ([slot.offset for slot in some], [slot.nbytes for slot in some])
    return _Part(start, stop, finder, *(np.array(column, np.int64) for column in columns))
