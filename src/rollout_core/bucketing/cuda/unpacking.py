"""A bucket written into existing tensors on its own GPU, in one launch."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter

import numpy as np
import torch

from rollout_core.bucketing.cuda import launching
from rollout_core.bucketing.cuda.tables import CopyTable
from rollout_core.bucketing.placement import Slot


class Scattering:
    """How some slots of one bucket are written, round after round: their tensors are contiguous and on the bucket's device."""

    def __init__(self, slots: Sequence[Slot], device: torch.device) -> None:
        count = len(slots)
        offsets, self._starts, sizes = (
            np.fromiter(map(attrgetter(word), slots), np.int64, count) for word in ("offset", "start", "nbytes")
        )
        self._table = CopyTable(offsets, sizes, device)

    def write(self, buffer: torch.Tensor, targets: Sequence[torch.Tensor]) -> None:
        """Write the slots' bytes of ``buffer`` into ``targets``, one whole tensor for each slot."""
        addresses = np.fromiter(map(torch.Tensor.data_ptr, targets), np.int64, len(targets))
        self._table.point(buffer.data_ptr(), addresses + self._starts)
        launching.copy(self._table)
