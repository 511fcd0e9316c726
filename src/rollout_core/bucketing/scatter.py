"""Writing buckets into tensors that exist: on a GPU a bucket at once, elsewhere slot by slot."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
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
        self._plan = plan
        self.targets = {spec.name: _checked(spec.name, targets.get(spec.name), spec) for spec in plan.specs if not spec.alias_of}
        self._ways: dict[tuple[int, torch.device], _Way] = {}

    def let_go(self) -> None:
        """Keep no tensor until ``take_up``."""
        self.targets = {}

    def take_up(self, targets: Mapping[str, torch.Tensor]) -> None:
        """Go on with these: on the devices, and of the dtypes and shapes, of those before. It is not checked again."""
        self.targets = {spec.name: targets[spec.name] for spec in self._plan.specs if not spec.alias_of}

    def write(self, layout: BucketLayout, buffer: torch.Tensor) -> None:
        """Write every slot of a bucket into its tensor, a piece of a split one into its part of it."""
        way = self._way(layout, buffer.device)
        if way.scattering is not None:
            way.scattering.write(buffer, list(map(self.targets.__getitem__, way.fast)))
        for slot in way.others:
            part = as_bytes(self.targets[slot.name].detach())[slot.start : slot.start + slot.nbytes]
            part.copy_(buffer[slot.offset : slot.end])

    def _way(self, layout: BucketLayout, device: torch.device) -> _Way:
        """How the slots of a bucket on this device are written."""
        found = self._ways.get((layout.index, device))
        if found is None:
            slots = tuple(slot for slot in layout.slots if slot.nbytes)
            found = _Way((), None, slots)
            if cuda.possible(device):
                from rollout_core.bucketing.cuda import launching, unpacking

                fast = tuple(slot for slot in slots if self.targets[slot.name].device == device)
                if fast and launching.usable(device):
                    others = tuple(slot for slot in slots if self.targets[slot.name].device != device)
                    found = _Way(tuple(slot.name for slot in fast), unpacking.Scattering(fast, device), others)
            self._ways[layout.index, device] = found
        return found


@dataclass(frozen=True, slots=True)
class _Way:
    """``fast``: the names of the slots that a kernel writes."""

    fast: tuple[str, ...]
    scattering: Scattering | None
    others: tuple[Slot, ...]


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
