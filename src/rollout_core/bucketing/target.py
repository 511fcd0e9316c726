"""One bucket being filled, and what its plan says of that beforehand."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import torch

from rollout_core.bucketing import cuda
from rollout_core.bucketing.copying import Run, conform, runs_of, write_run, write_slot, zero_padding
from rollout_core.bucketing.digest import LaterLanes
from rollout_core.bucketing.placement import BucketLayout, Slot
from rollout_core.bucketing.plan import BucketPlan
from rollout_core.bucketing.specs import TensorSpec
from rollout_core.bucketing.tensors import as_bytes, check_describable, own_copy

if TYPE_CHECKING:
    from rollout_core.bucketing.cuda.packing import Filling
    from rollout_core.bucketing.gathering import Gathering

NewBuffer = Callable[[int, torch.device], torch.Tensor]
#: How a kernel fills a bucket on a device, and whether it digests it; None if none does.
FillingFor: TypeAlias = "Callable[[BucketLayout, torch.device], tuple[Filling, bool] | None]"
#: How compiled code fills it on a CPU; None if it does not.
GatheringFor: TypeAlias = "Callable[[BucketLayout], Gathering | None]"


@dataclass(frozen=True, slots=True)
class Work:
    """What one bucket asks for: the source's tensors up to ``until``.

    ``in_order``: the bucket's slots are just those tensors, whole and in the source's order; ``runs`` are theirs.
    """

    layout: BucketLayout
    gaps: tuple[tuple[int, int], ...]
    until: int
    runs: tuple[Run, ...]
    in_order: bool


def work_of(plan: BucketPlan) -> tuple[Work, ...]:
    places = {spec.name: place for place, spec in enumerate(plan.specs)}
    work, until = [], 0
    for layout in plan.buckets:
        start = until
        until = max(until, *(places[slot.name] + 1 for slot in layout.slots))
        if layout is plan.buckets[-1]:
            until = len(plan.specs)
        in_order = [places[slot.name] for slot in layout.slots] == list(range(start, until))
        in_order = in_order and not any(slot.is_piece for slot in layout.slots)
        runs = tuple(runs_of(layout)) if in_order else ()
        work.append(Work(layout, tuple(layout.gaps()), until, runs, in_order))
    return tuple(work)


class Target:
    """One bucket being filled. Its buffer is made when the first tensor says on which device."""

    def __init__(self, work: Work, new_buffer: NewBuffer) -> None:
        self._work = work
        self._new_buffer = new_buffer
        self._buffer: torch.Tensor | None = None
        self._filled = False  # by a kernel, padding included
        self._slots: dict[str, Slot] = {}
        #: Of the digest, if a kernel computed them.
        self.lanes: LaterLanes | None = None

    def copy_in_order(
        self, tensors: list[torch.Tensor], executor: Executor | None, filling: FillingFor, gathering: GatheringFor
    ) -> None:
        """Copy a bucket whose slots are just these tensors: at once on a GPU, and many small ones on a CPU; else runs of like ones
        at once."""
        slots = self._work.layout.slots
        if self._fill(slots[0], tensors, filling, lambda slot, tensor: self._copy(slot, {slot.name: tensor})):
            return
        if tensors[0].device.type == "cpu" and (small := gathering(self._work.layout)) is not None:
            buffer = self._at(tensors[0].device)
            if buffer.device.type == "cpu" and small.fill(buffer, tensors, executor):
                return
        start = 0
        for run in self._work.runs:
            part = tensors[start : start + len(run.slots)]
            start += len(run.slots)
            check_describable(run.slots[0].name, part[0])
            if not (run.alike and write_run(self._at(part[0].device), run, part, executor)):
                for slot, tensor in zip(run.slots, part, strict=True):
                    self._copy(slot, {slot.name: tensor})

    def copy_by_name(self, held: dict[str, torch.Tensor], filling: FillingFor) -> None:
        """Copy every slot, each from the tensor of its name."""
        slots = self._work.layout.slots
        for slot in slots:
            if slot.is_piece and slot.start == 0:
                held[slot.name] = as_bytes(conform(slot.spec, held[slot.name]))
        if not self._fill(slots[0], [held[slot.name] for slot in slots], filling, self._copy_ready):
            for slot in slots:
                self._copy_ready(slot, held[slot.name])
        for slot in slots:
            if slot.is_tail:
                del held[slot.name]

    def _fill(
        self,
        first: Slot,
        tensors: list[torch.Tensor],
        filling: FillingFor,
        write: Callable[[Slot, torch.Tensor], None],
    ) -> bool:
        """Fill the whole bucket by a kernel, if there is one where its buffer is."""
        check_describable(first.name, tensors[0])
        if not cuda.possible(tensors[0].device):  # without a buffer yet: its tensor may still be refused
            return False
        buffer = self._at(tensors[0].device)
        found = filling(self._work.layout, buffer.device)
        if found is None:
            return False
        how, digest = found
        self.lanes = how.fill(buffer, tensors, write, digest=digest)
        self._filled = True
        return True

    def _copy_ready(self, slot: Slot, tensor: torch.Tensor) -> None:
        """Copy a slot from its tensor, of a split one from its bytes."""
        plain = tensor if slot.is_piece else conform(slot.spec, tensor)
        write_slot(self._at(plain.device), slot, plain)

    def copy_held(self, held: dict[str, torch.Tensor]) -> None:
        """Copy what was taken earlier and has its place, or its next piece, here."""
        self._slots = {slot.name: slot for slot in self._work.layout.slots}
        for name in [name for name in held if name in self._slots]:
            self._copy(self._slots[name], held)

    def take_one(self, name: str, held: dict[str, torch.Tensor], spec: TensorSpec) -> None:
        """Copy one tensor just taken, or keep a copy of it for the bucket that its group completes in."""
        if spec.alias_of is not None:
            del held[name]
            return
        slot = self._slots.get(name)
        if slot is not None:
            self._copy(slot, held)
        else:
            held[name] = own_copy(conform(spec, held[name]))

    def close(self) -> torch.Tensor:
        """The filled buffer, its padding zeroed: a buffer may have been used before."""
        assert self._buffer is not None  # a layout has a slot, and filling it made the buffer
        if not self._filled:
            zero_padding(self._buffer, self._work.gaps)
        return self._buffer

    def _at(self, device: torch.device) -> torch.Tensor:
        if self._buffer is None:
            self._buffer = self._new_buffer(self._work.layout.nbytes, device)
        return self._buffer

    def _copy(self, slot: Slot, held: dict[str, torch.Tensor]) -> None:
        """Copy one slot. A tensor that is to be split is kept as bytes until its last piece is copied."""
        tensor = held[slot.name]
        if slot.start == 0:
            tensor = conform(slot.spec, tensor)
            if slot.is_piece:
                tensor = held[slot.name] = as_bytes(tensor)
        write_slot(self._at(tensor.device), slot, tensor)
        if slot.is_tail:
            del held[slot.name]
