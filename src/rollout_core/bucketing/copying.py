"""Copying tensors into their slots: one by one in the general case, a run of like tensors at once where memory allows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, Executor, Future
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from operator import attrgetter
from typing import Final

import torch

from rollout_core.bucketing.dtypes import BIT_EXACT_COPY
from rollout_core.bucketing.placement import BucketLayout, Slot
from rollout_core.bucketing.specs import TensorSpec
from rollout_core.bucketing.tensors import (
    PLAIN_TYPES,
    as_bytes,
    check_describable,
    describe,
    materialize,
    resolved,
    same_bits_copy,
    was_freed,
)
from rollout_core.compiled.library import LOW
from rollout_core.errors import PlanMismatchError

#: Bytes below which a copy is too short for torch to share it among threads.
SMALL: Final = 256 << 10
#: Bytes that are worth a job of their own: enough to hide its making, few enough to share the work evenly.
JOB: Final = 8 << 20


@dataclass(frozen=True, slots=True)
class Run:
    """Neighbouring slots. If ``alike``, whole tensors of one dtype that differ in their first size at most and lie without a gap:
    one concatenation fills them all. ``sizes`` are their bytes."""

    slots: tuple[Slot, ...]
    sizes: tuple[int, ...]
    alike: bool


def runs_of(layout: BucketLayout) -> Iterator[Run]:
    """The runs of a bucket of whole tensors."""
    run: list[Slot] = []
    for slot in layout.slots:
        if run and not _continues(run[-1], slot):
            yield _run_of(run)
            run = []
        run.append(slot)
    yield _run_of(run)


def _continues(before: Slot, slot: Slot) -> bool:
    """Whether both are non-empty tensors that one concatenation along the first dimension can write."""
    a, b = before.spec, slot.spec
    return (
        a.dtype == b.dtype
        and before.end == slot.offset
        and bool(a.shape and b.shape and before.nbytes and slot.nbytes)
        and a.shape[1:] == b.shape[1:]
        and a.dtype in BIT_EXACT_COPY
        and not a.dtype.is_complex
    )


def _run_of(slots: list[Slot]) -> Run:
    return Run(tuple(slots), tuple(slot.nbytes for slot in slots), alike=len(slots) > 1)


def write_slot(buffer: torch.Tensor, slot: Slot, tensor: torch.Tensor) -> None:
    """Copy a plain tensor of the slot's spec, or for a piece the bytes of the whole tensor, into the slot's place in ``buffer``."""
    target = buffer[slot.offset : slot.end]
    if slot.is_piece:
        target.copy_(tensor[slot.start : slot.start + slot.nbytes])
    elif tensor.is_contiguous():
        target.copy_(as_bytes(tensor))
    else:
        same_bits_copy(target.view(tensor.dtype).view(tensor.shape), resolved(tensor))


def zero_padding(buffer: torch.Tensor, gaps: Iterable[tuple[int, int]]) -> None:
    """Zero what lies between the slots (offset, nbytes): memory may have been used before."""
    for offset, nbytes in gaps:
        buffer[offset : offset + nbytes].zero_()


def write_run(buffer: torch.Tensor, run: Run, tensors: list[torch.Tensor], executor: Executor | None) -> bool:
    """Copy a whole run of like tensors at once, if these are plain CPU tensors as the plan says; False leaves it to be copied one
    by one, which names what is wrong with them."""
    if buffer.device.type != "cpu":
        return False
    spec = run.slots[0].spec
    typed = buffer[run.slots[0].offset : run.slots[-1].end].view(spec.dtype).view(-1, *spec.shape[1:])
    if executor is not None and len(jobs := _jobs(run, spec.nbytes // spec.shape[0])) > 1:
        return all_do(executor, (partial(_concatenate, tensors[a:b], run.sizes[a:b], typed[c:d]) for a, b, c, d in jobs))
    return _concatenate(tensors, run.sizes, typed)


def all_do(executor: Executor, jobs: Iterable[Callable[[], bool]]) -> bool:
    """Whether all of these give True, once all have ended, whatever happens to one: none may write to a buffer later. Not ``wait``,
    which waits on for what is cancelled."""
    futures: list[Future[bool]] = []
    try:
        futures.extend(map(executor.submit, jobs))
    finally:
        for future in futures:
            with suppress(CancelledError):
                future.exception()
    done = [future.result() for future in futures]
    return all(done)


_DTYPE: Final = attrgetter("dtype")
_NBYTES: Final = attrgetter("nbytes")


def _concatenate(tensors: list[torch.Tensor], sizes: tuple[int, ...], out: torch.Tensor) -> bool:
    """Fill ``out`` with tensors of its dtype and trailing sizes and these numbers of bytes. False, with ``out`` undefined, if they
    are not that. Checks are maps over C attributes: for ten thousand small tensors Python is what costs. Tensors that are not
    dense or not on the CPU make torch.cat raise."""
    try:
        fits = (
            PLAIN_TYPES.issuperset(map(type, tensors))
            and set(map(_DTYPE, tensors)) == {out.dtype}
            and tuple(map(_NBYTES, tensors)) == sizes
            and not any(map(torch.Tensor.is_neg, tensors))  # torch.cat resolves them in float registers
            # torch.cat reads what was freed, and ends the process.
            and (min(map(torch.Tensor.data_ptr, tensors)) >= LOW or not any(map(was_freed, tensors)))
            and tensors[0].shape[1:] == out.shape[1:]  # torch.cat compares the rest with the first, and would resize its output
        )
        if fits:
            with torch.no_grad():  # per thread, so said here
                torch.cat(tensors, out=out)
    except RuntimeError:
        return False
    return fits


def conform(spec: TensorSpec, tensor: torch.Tensor) -> torch.Tensor:
    """The plain tensor, gathered only now if it is sharded; ``PlanMismatchError`` unless it is what the plan says."""
    check_describable(spec.name, tensor)
    if tensor.dtype != spec.dtype or tuple(tensor.shape) != spec.shape:
        raise PlanMismatchError(
            f"tensor {spec.name!r} of the source is {describe(tensor.dtype, tuple(tensor.shape))}, and of the plan {spec}"
        )
    return materialize(spec.name, tensor)


def _jobs(run: Run, row_nbytes: int) -> list[tuple[int, int, int, int]]:
    """Cut a run of small tensors into jobs: tensors from, to, rows from, to. Large ones torch shares among its threads itself."""
    total = sum(run.sizes)
    count = max(1, min(len(run.sizes), total // JOB)) if total < SMALL * len(run.sizes) else 1
    bounds = [i * len(run.sizes) // count for i in range(count + 1)]
    jobs, row = [], 0
    for start, end in pairwise(bounds):
        rows = sum(run.sizes[start:end]) // row_nbytes
        jobs.append((start, end, row, row + rows))
        row += rows
    return jobs
