"""Writing buckets into tensors that exist: on a GPU a bucket at once, elsewhere slot by slot."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from rollout_core.bucketing import cuda
from rollout_core.bucketing.placement import BucketLayout, Slot
from rollout_core.bucketing.plan import BucketPlan
from rollout_core.bucketing.specs import TensorSpec
from rollout_core.bucketing.tensors import as_bytes, describe, is_sharded
from rollout_core.errors import PlanMismatchError

if TYPE_CHECKING:
    from rollout_core.bucketing.cuda.unpacking import Scattering


class Scatter:
    """The tensors that the buckets of a plan are written into, by the names of its tensors that travel.

    They are contiguous, on any device, and do not overlap. Raises ``PlanMismatchError`` naming the first that is missing, or not
    what the plan says.
    """

    def __init__(self, plan: BucketPlan, targets: Mapping[str, torch.Tensor]) -> None:
        self.targets = {spec.name: _checked(spec.name, targets.get(spec.name), spec) for spec in plan.specs if not spec.alias_of}
        self._fast: dict[tuple[int, torch.device], tuple[tuple[Slot, ...], Scattering | None]] = {}

    def write(self, layout: BucketLayout, buffer: torch.Tensor) -> None:
        """Write every slot of a bucket into its tensor, a piece of a split one into its part of it."""
        fast, scattering = self._fast_slots(layout, buffer.device)
        if scattering is not None:
            scattering.write(buffer, [self.targets[slot.name] for slot in fast])
            slots = tuple(slot for slot in layout.slots if self.targets[slot.name].device != buffer.device)
        else:
            slots = layout.slots
        for slot in slots:
            if slot.nbytes:
                part = as_bytes(self.targets[slot.name])[slot.start : slot.start + slot.nbytes]
                part.copy_(buffer[slot.offset : slot.end])

    def _fast_slots(self, layout: BucketLayout, device: torch.device) -> tuple[tuple[Slot, ...], Scattering | None]:
        """The slots that a kernel writes, and how."""
        if not cuda.possible(device):
            return (), None
        found = self._fast.get((layout.index, device))
        if found is None:
            from rollout_core.bucketing.cuda import launching, unpacking

            slots = tuple(slot for slot in layout.slots if slot.nbytes and self.targets[slot.name].device == device)
            works = bool(slots) and launching.usable(device)
            found = self._fast[layout.index, device] = (slots, unpacking.Scattering(slots, device) if works else None)
        return found


def _checked(name: str, tensor: torch.Tensor | None, spec: TensorSpec) -> torch.Tensor:
    if tensor is None:
        raise PlanMismatchError(f"there is no tensor {name!r} to write into, and the plan has one ({spec})")
    if (tensor.dtype, tuple(tensor.shape)) != (spec.dtype, spec.shape):
        words = describe(tensor.dtype, tuple(tensor.shape))
        raise PlanMismatchError(f"tensor {name!r} is {spec} in the plan, and the one to write into is {words}")
    why = None
    if is_sharded(tensor):
        why = "is a DTensor, of which this rank has a part"
    elif tensor.is_meta:
        why = "is on the meta device and has no memory"
    elif not tensor.is_contiguous() or tensor.is_conj() or tensor.is_neg():
        why = "is not contiguous memory"
    if why is not None:
        raise PlanMismatchError(f"the tensor {name!r} to write into {why}; unpack views and copy them instead")
    return tensor.detach()
