"""How tensors are made of a bucket's bytes: worked out once for a plan, and kept with it."""

from __future__ import annotations

import math
from collections.abc import Container, Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from operator import mul
from typing import TypeAlias

import torch

from rollout_core.bucketing.placement import Slot
from rollout_core.bucketing.sources import Pair

#: A slot, its name and shape, and the strides of its tensor; None for those of a piece.
Step: TypeAlias = tuple[Slot, str, tuple[int, ...], tuple[int, ...] | None]
#: A tensor's name, shape and strides, and the number of its first element if the bucket were an array of its dtype.
Whole: TypeAlias = tuple[str, tuple[int, ...], tuple[int, ...], int]


@dataclass(frozen=True, slots=True)
class Recipe:
    """Of one bucket, in the order in which its tensors are handed out. ``wholes``: those in ``steps`` by runs of one dtype, if the
    bucket holds whole tensors of one name each; else None."""

    steps: tuple[Step, ...]
    wholes: tuple[tuple[torch.dtype, tuple[Whole, ...]], ...] | None

    @classmethod
    def of(cls, slots: Iterable[Slot], tied: Container[str]) -> Recipe:
        """Of these slots. ``tied``: the names that have others."""
        steps: list[Step] = []
        runs: list[tuple[torch.dtype, list[Whole]]] = []
        plain = True
        for slot in slots:
            spec = slot.spec
            name, dtype, shape = spec.name, spec.dtype, spec.shape
            nbytes, strides = _measures(dtype, shape)
            is_whole = slot.nbytes == nbytes
            plain = plain and is_whole and name not in tied
            steps.append((slot, name, shape, strides if is_whole else None))
            if not runs or runs[-1][0] is not dtype:
                runs.append((dtype, []))
            runs[-1][1].append((name, shape, strides, slot.offset // dtype.itemsize))
        return cls(tuple(steps), tuple((dtype, tuple(run)) for dtype, run in runs) if plain else None)


@lru_cache(maxsize=1024)
def _measures(dtype: torch.dtype, shape: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
    """The bytes of a tensor, and its strides. A model has few that differ."""
    return math.prod(shape) * dtype.itemsize, _contiguous_strides(shape)


def _contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of a contiguous tensor, as torch counts them (a size of 0 counts as 1)."""
    return tuple(accumulate((max(size, 1) for size in reversed(shape[1:])), mul, initial=1))[::-1] if shape else ()


class Views:
    """Typed views of one buffer: one view per dtype, from which each tensor is one more step."""

    def __init__(self, buffer: torch.Tensor) -> None:
        aligned = buffer.storage_offset() % 16 == 0 and buffer.data_ptr() % 16 == 0
        # A receiver that put its buffer at an odd address still gets tensors; they cannot be views of it.
        self._buffer = buffer if aligned else buffer.clone()
        self._typed: dict[torch.dtype, tuple[torch.Tensor, int]] = {}

    def tensor(self, slot: Slot, shape: tuple[int, ...], strides: tuple[int, ...]) -> torch.Tensor:
        dtype = slot.spec.dtype
        view, start = self._of(dtype)
        return view.as_strided(shape, strides, start + slot.offset // dtype.itemsize)

    def pairs(self, dtype: torch.dtype, wholes: Iterable[Whole]) -> list[Pair]:
        """Names and tensors of a run of a recipe's ``wholes``."""
        view, start = self._of(dtype)
        make = view.as_strided
        return [(name, make(shape, strides, start + first)) for name, shape, strides, first in wholes]

    def _of(self, dtype: torch.dtype) -> tuple[torch.Tensor, int]:
        """The buffer as an array of this dtype, and the number of its first element in its storage."""
        typed = self._typed.get(dtype)
        if typed is None:
            whole = self._buffer.numel() // dtype.itemsize * dtype.itemsize
            view = self._buffer[:whole].view(dtype)
            typed = self._typed[dtype] = (view, int(view.storage_offset()))
        return typed
