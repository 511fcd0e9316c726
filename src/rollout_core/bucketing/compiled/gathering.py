"""A bucket filled from many small tensors on the CPU. torch needs longer to find and call for each than to copy it."""

from __future__ import annotations

from concurrent.futures import Executor
from itertools import pairwise

import numpy as np
import torch

from rollout_core.bucketing.compiled.finding import MANY, Finder, compiled
from rollout_core.bucketing.copying import JOB, SMALL, results_of
from rollout_core.bucketing.placement import BucketLayout


class Gathering:
    """How one bucket of a plan is filled, round after round. It keeps no tensor."""

    @classmethod
    def of(cls, layout: BucketLayout) -> Gathering | None:
        """Of a bucket of whole tensors. None if they are few, or large, which torch copies as well; and without compiled code."""
        slots = layout.slots
        is_small = len(slots) >= MANY and layout.nbytes < SMALL * len(slots)
        if not is_small or not all(0 < slot.nbytes < JOB for slot in slots):
            return None
        finder = Finder.of([slot.spec.dtype for slot in slots], [slot.spec.shape for slot in slots], torch.device("cpu"))
        return None if finder is None else cls(layout, finder)

    def __init__(self, layout: BucketLayout, finder: Finder) -> None:
        self._finder = finder
        self._places = np.array([slot.offset for slot in layout.slots], np.int64)
        self._sizes = np.array([slot.nbytes for slot in layout.slots], np.int64)
        ends = np.cumsum(self._sizes)
        jobs = np.arange(0, ends[-1], JOB)
        self._jobs = [*np.searchsorted(ends, jobs, side="right").tolist(), len(ends)]

    def fill(self, buffer: torch.Tensor, tensors: list[torch.Tensor], executor: Executor | None) -> bool:
        """Fill ``buffer``, the bucket's, but for its padding, from ``tensors``, one for each slot. False, and nothing is written,
        if they are not all plain contiguous CPU tensors as planned."""
        library = compiled()
        assert library is not None  # or there was no finder
        found = self._finder.addresses(tensors)
        if found is None:
            return False
        parts = [slice(start, stop) for start, stop in pairwise(self._jobs if executor is not None else (0, len(found)))]
        work = [(found[part], self._places[part], self._sizes[part], buffer.data_ptr()) for part in parts]
        if executor is None or len(work) == 1:
            for one in work:
                library.gather(*one)
        else:
            results_of([executor.submit(library.gather, *one) for one in work])
        return True
