"""Copying tensors into their slots: one by one in the general case, a run of like tensors at once where memory allows."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Executor, wait
from dataclasses import dataclass
from itertools import pairwise
from operator import attrgetter
from typing import Final

import torch

from rollout_core.bucketing.dtypes import BIT_EXACT_COPY
from rollout_core.bucketing.placement import BucketLayout, Slot
from rollout_core.bucketing.specs import TensorSpec
from rollout_core.bucketing.tensors import PLAIN_TYPES, as_bytes, check_describable, describe, materialize, resolved, same_bits_copy
from rollout_core.errors import PlanMismatchError

_SMALL: Final = 256 << 10  # below this a copy is too short for torch to share it among threads
_JOB: Final = 8 << 20  # bytes of small tensors that are worth a job of their own


@dataclass(frozen=True, slots=True)
class Run:
    """Neighbouring slots. If ``alike``, whole tensors of one dtype that differ in their first size at most and lie without a gap:
    one concatenation fills them all."""

    slots: tuple[Slot, ...]
    names: tuple[str, ...]
    sizes: tuple[int, ...]
    alike: bool


def runs_of(layout: BucketLayout) -> Iterator[Run]:
    run: list[Slot] = []
    for slot in layout.slots:
        if run and not _continues(run[-1], slot):
            yield _run_of(run)
            run = []
        run.append(slot)
    yield _run_of(run)


def _continues(before: Slot, slot: Slot) -> bool:
    """Whether both are whole, non-empty tensors that one concatenation along the first dimension can write."""
    a, b = before.spec, slot.spec
    return (
        a.dtype == b.dtype
        and before.end == slot.offset
        and bool(a.shape and b.shape and before.nbytes and slot.nbytes)
        and a.shape[1:] == b.shape[1:]
        and not before.is_piece
        and not slot.is_piece
        and a.dtype in BIT_EXACT_COPY
        and not a.dtype.is_complex
    )


def _run_of(slots: list[Slot]) -> Run:
    names, sizes = tuple(slot.name for slot in slots), tuple(slot.nbytes for slot in slots)
    return Run(tuple(slots), names, sizes, alike=len(slots) > 1)


def write_slot(buffer: torch.Tensor, slot: Slot, tensor: torch.Tensor) -> None:
    """Copy a plain tensor of the slot's spec, or for a piece the bytes of the whole tensor, into the slot's place in ``buffer``."""
    target = buffer[slot.offset : slot.end]
    if slot.is_piece:
        target.copy_(tensor[slot.start : slot.start + slot.nbytes])
    elif tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg():
        target.copy_(as_bytes(tensor))
    else:
        same_bits_copy(target.view(tensor.dtype).view(tensor.shape), resolved(tensor))


def zero_padding(buffer: torch.Tensor, layout: BucketLayout) -> None:
    """Zero what lies between the slots: memory may have been used before."""
    for offset, nbytes in layout.gaps():
        buffer[offset : offset + nbytes].zero_()


def write_run(buffer: torch.Tensor, run: Run, tensors: list[torch.Tensor], executor: Executor | None) -> bool:
    """Copy a whole run at once, if these are plain CPU tensors as the plan says; False leaves it to be copied one by one."""
    if not run.alike or buffer.device.type != "cpu" or not _alike(run, tensors):
        return False
    spec = run.slots[0].spec
    typed = buffer[run.slots[0].offset : run.slots[-1].end].view(spec.dtype).view(-1, *spec.shape[1:])
    jobs = _jobs(run, spec.nbytes // spec.shape[0]) if executor else []
    if executor is None or len(jobs) < 2:
        return _cat(tensors, typed)
    futures = [executor.submit(_cat, tensors[a:b], typed[c:d]) for a, b, c, d in jobs]
    wait(futures)  # all of them, whatever happens to one: none may write to the buffer later
    return False not in [future.result() for future in futures]


def conform(spec: TensorSpec, tensor: torch.Tensor) -> torch.Tensor:
    """The plain tensor, gathered only now if it is sharded; ``PlanMismatchError`` unless it is what the plan says."""
    check_describable(spec.name, tensor)
    if tensor.dtype != spec.dtype or tuple(tensor.shape) != spec.shape:
        raise PlanMismatchError(
            f"tensor {spec.name!r} of the source is {describe(tensor.dtype, tuple(tensor.shape))}, and of the plan {spec}"
        )
    return materialize(spec.name, tensor)


_KIND: Final = attrgetter("dtype", "layout", "device")
_NBYTES: Final = attrgetter("nbytes")


def _alike(run: Run, tensors: list[torch.Tensor]) -> bool:
    """Whether the tensors are dense CPU ones of the run's dtype and sizes. Trailing sizes are left to ``_cat``."""
    spec = run.slots[0].spec
    return (
        PLAIN_TYPES.issuperset(map(type, tensors))
        and set(map(_KIND, tensors)) == {(spec.dtype, torch.strided, torch.device("cpu"))}
        and tuple(map(_NBYTES, tensors)) == run.sizes
    )


def _cat(tensors: list[torch.Tensor], out: torch.Tensor) -> bool:
    if tensors[0].shape[1:] != out.shape[1:]:
        return False  # torch.cat compares the tensors with the first, and would resize the output to fit it
    with torch.no_grad():  # per thread, so said here
        try:
            torch.cat(tensors, out=out)
        except RuntimeError:
            return False  # copied one by one instead, which names the tensor that is wrong
    return True


def _jobs(run: Run, row_nbytes: int) -> list[tuple[int, int, int, int]]:
    """Cut a run of small tensors into jobs: tensors from, to, rows from, to."""
    total = sum(run.sizes)
    count = max(1, total // _JOB) if total < _SMALL * len(run.sizes) else 1
    bounds = [i * len(run.sizes) // count for i in range(count + 1)]
    jobs, row = [], 0
    for start, end in pairwise(bounds):
        rows = sum(run.sizes[start:end]) // row_nbytes
        jobs.append((start, end, row, row + rows))
        row += rows
    return jobs
