"""The kernels, called with tensors. Triton is imported with the first call."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

import numpy as np
import torch

from rollout_core.bucketing.cuda import possible
from rollout_core.bucketing.cuda.partials import Partials
from rollout_core.bucketing.cuda.tables import VECTOR, CopyTable, PackTable, on_device
from rollout_core.bucketing.digest import BLOCK_NBYTES, Lanes, block_multilinear_by_torch
from rollout_core.compiled.library import Integers

#: Of a program that digests: with one column of a block for each thread, the keys are constants; with two, as in a pass that copies
#: as well, there is room to load the next block meanwhile. And how many such programs a multiprocessor has, in turns.
_WARPS: Final = 4
_DIGESTING: Final = 4
_FUSED_WARPS: Final = 2
_FUSED: Final = 5
#: Programs that only copy are one for each block. Measured on an H200, like those above.
_COPYING_WARPS: Final = 16
_SMALL_COPYING_WARPS: Final = 8  # where most entries are half a block or less
_JOINING_WARPS: Final = 8
_PARTS_WARPS: Final = 8


def usable(device: torch.device) -> bool:
    """Whether the kernels run on this device: a CUDA GPU, Triton, and what Triton itself needs. A warning says what is missing."""
    return possible(device) and _works(torch.cuda.current_device() if device.index is None else device.index)


def digest_lanes(buffer: torch.Tensor) -> Lanes:
    """``digest.block_multilinear`` of a 1-d uint8 tensor on a GPU, at any address."""
    return begin_digest(buffer).wait()


def begin_digest(buffer: torch.Tensor) -> Partials:
    """``digest_lanes`` under way: nothing waits for the device yet. The buffer has to stay as it is for the current stream."""
    if buffer.data_ptr() % 16:
        buffer = buffer.clone()
    nbytes = buffer.numel()
    # The last block is read apart if its bytes end within a vector.
    blocks = nbytes // BLOCK_NBYTES if nbytes % 16 else -(-nbytes // BLOCK_NBYTES)
    rest = nbytes - blocks * BLOCK_NBYTES
    programs = _programs(buffer.device, _DIGESTING, blocks)
    partials = Partials(buffer.device, programs + (rest > 0))
    kernels = _kernels()
    with _on(buffer.device), partials:
        if blocks:
            words = min(nbytes, blocks * BLOCK_NBYTES) // 4
            kernels.digest_aligned[(programs,)](buffer.data_ptr(), words, blocks, partials.memory, num_warps=_WARPS)
        if rest > 0:
            kernels.digest_part[(1,)](buffer.data_ptr() + nbytes - rest, rest, blocks, partials.memory[programs:], num_warps=_WARPS)
    return partials


def digest_rows(device: torch.device, addresses: Integers, sizes: Integers, firsts: Integers) -> torch.Tensor:
    """The lanes of many payloads, int64 of shape [payloads, 2] on the device, in a launch or two: of ``sizes`` bytes at
    ``addresses``, any, their blocks counted from ``firsts``. Nothing waits for the device."""
    lanes = torch.zeros((len(sizes), 2), dtype=torch.int64, device=device)
    fit = (addresses | sizes) % VECTOR == 0
    for aligned in (True, False):
        chosen = np.flatnonzero((fit == aligned) & (sizes > 0))
        counts = -(-sizes[chosen] // BLOCK_NBYTES)
        total = int(counts.sum())
        if not total:
            continue
        begins = np.cumsum(counts) - counts
        table = on_device(device, np.stack([addresses[chosen], sizes[chosen], firsts[chosen], begins, chosen, counts]))
        rows = torch.repeat_interleave(table[5], output_size=total)
        each = -(-total // _programs(device, _DIGESTING, total))
        with _on(device):
            grid = (-(-total // each),)
            _kernels().digest_rows[grid](total, each, len(chosen), rows, table, lanes, aligned, num_warps=_WARPS)
    return lanes


def gather(table: PackTable, buffer: torch.Tensor, *, digest: bool) -> Partials | None:
    """Fill a bucket's buffer from a table that points to its sources; the buffer's lanes, if asked for. Nothing waits for the
    device."""
    device, target, bases = buffer.device, buffer.data_ptr(), table.bases
    kernels = _kernels()
    launches: list[_Launch] = []
    if (a := table.aligned if digest else table.joined) is not None:
        aligned = (a.ones, a.others, a.splits, a.ends, bases)
        launches.append(_Launch(kernels.gather_aligned, a.blocks, aligned, _JOINING_WARPS, _FUSED_WARPS, _FUSED))
    if (s := table.shifted) is not None:
        launches.append(_Launch(kernels.gather_shifted, s.blocks, (s.ones, bases)))
    if (p := table.parts) is not None:
        parts = (p.rows, p.stops, bases, table.row_starts, table.row_ends, table.nbytes)
        launches.append(_Launch(kernels.gather_parts, p.blocks, parts))
    counts = [one.blocks.numel() for one in launches]
    grids = counts if not digest else [_programs(device, one.each, count) for one, count in zip(launches, counts, strict=True)]
    partials = Partials(device, sum(grids)) if digest else None
    done = 0
    with _on(device), partials or nullcontext():
        if table.whole is not None and not digest:
            blocks = table.whole.blocks
            kernels.gather_whole[(blocks.numel(),)](target, blocks, table.whole.sources, num_warps=_COPYING_WARPS)
        for one, count, programs in zip(launches, counts, grids, strict=True):
            part = None if partials is None else partials.memory[done:]
            warps = one.digesting_warps if digest else one.warps
            one.kernel[(programs,)](target, count, one.blocks, *one.columns, part, digest, num_warps=warps)
            done += programs
    return partials


@dataclass(frozen=True, slots=True)
class _Launch:
    """Of a gathering kernel: ``warps`` of a program that only copies, of which there is one for each block; ``digesting_warps`` of
    one that digests, too, of which a multiprocessor has ``each``."""

    kernel: Any
    blocks: torch.Tensor
    columns: tuple[Any, ...]
    warps: int = _PARTS_WARPS
    digesting_warps: int = _WARPS
    each: int = _DIGESTING


def copy(table: CopyTable) -> None:
    """Copy every row of a table. Nothing waits for the device."""
    kernels = _kernels()
    entries = (
        (kernels.copy_aligned, table.aligned, _SMALL_COPYING_WARPS if table.is_small else _COPYING_WARPS),
        (kernels.copy_shifted, table.shifted, _PARTS_WARPS),
        (kernels.copy_parts, table.parts, _PARTS_WARPS),
    )
    with _on(table.device):
        for kernel, some, warps in entries:
            if some is not None:
                kernel[(some.sizes.numel(),)](table.source, some.starts, some.targets, some.sizes, num_warps=warps)


@cache
def _kernels() -> Any:
    from rollout_core.bucketing.cuda import kernels

    return kernels


@cache
def _works(index: int) -> bool:
    """Whether a kernel compiles, runs and gives the right value on this GPU."""
    sample = torch.arange(9, dtype=torch.uint8, device=torch.device("cuda", index))
    try:
        if digest_lanes(sample) == block_multilinear_by_torch(sample):
            return True
        reason = "its result is wrong"
    except Exception as error:  # no Triton, no compiler, an old GPU: whatever it is, torch does the work
        reason = f"{type(error).__name__}: {error}"
    warnings.warn(f"buckets are packed without the Triton kernels, which do not run here ({reason})", RuntimeWarning, stacklevel=2)
    return False


@cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":  # Triton's interpreter
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def _programs(device: torch.device, each: int, blocks: int) -> int:
    return min(blocks, each * _multiprocessors(device))


@contextmanager
def _on(device: torch.device) -> Iterator[None]:
    """Triton launches on the current device."""
    if device.type != "cuda":
        yield
        return
    with torch.cuda.device(device):
        yield
