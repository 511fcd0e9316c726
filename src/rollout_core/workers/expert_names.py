"""A trainer's experts by the names of checkpoints, which engines load.

transformers 5 has two tensors for all experts of a layer, ``experts.gate_up_proj`` [experts, gate and up rows, hidden] and
``experts.down_proj`` [experts, hidden, intermediate], and writes checkpoints of three matrices for each expert.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from typing import Any, Final

import torch

from rollout_core.bucketing.sources import Source
from rollout_core.bucketing.tensors import is_sharded
from rollout_core.errors import DuplicateNameError
from rollout_core.transfer.sharded import Deferred
from rollout_core.workers.names import canonical

_FUSED: Final = (".experts.gate_up_proj", ".experts.up_proj", ".experts.down_proj")


def in_checkpoint_names(source: Source, names: Collection[str]) -> Source:
    """A dict or list of tensors in which those of all experts of a layer are given expert by expert, where an engine has them under
    such ``names``: views of them, or for those that are gathered when they are asked for, parts of one that is gathered once.
    Anything else is returned as it is. ``DuplicateNameError`` for an expert that comes both ways."""
    if not names or not isinstance(source, dict | list | tuple):
        return source
    pairs = list(source.items()) if isinstance(source, dict) else source
    if not any(type(pair) is tuple and str(pair[0]).endswith(_FUSED) for pair in pairs):
        return source
    if not all(
        type(pair) is tuple and len(pair) == 2 and isinstance(pair[0], str) and isinstance(pair[1], torch.Tensor) for pair in pairs
    ):
        return source  # refused by who reads it, with the reason
    known = {canonical(name) for name in names}
    split: list[tuple[str, torch.Tensor]] = []
    for name, tensor in pairs:
        made = () if canonical(name) in known else _split(name, tensor, known)
        split += made or [(name, tensor)]
    if not isinstance(source, dict):
        return split
    found = dict(split)
    if len(found) != len(split):
        twice = next(name for name, tensor in split if found[name] is not tensor)
        raise DuplicateNameError(f"{twice!r} is in the source by itself, and in the tensor of all experts of its layer, too")
    return found


def _split(name: str, tensor: torch.Tensor, known: set[str]) -> list[tuple[str, torch.Tensor]]:
    """The matrices of each expert by their names in a checkpoint; none if the engine has not just these."""
    place, _, fused = name.rpartition(".")
    leaves = ("gate_proj", "up_proj") if fused == "gate_up_proj" else (fused,)
    if tensor.dim() != 3 or tensor.shape[1] % len(leaves):
        return []
    rows = tensor.shape[1] // len(leaves)
    parts = [(number, turn) for number in range(tensor.shape[0]) for turn in range(len(leaves))]
    named = [f"{place}.{number}.{leaves[turn]}.weight" for number, turn in parts]
    if not known.issuperset(map(canonical, named)):
        return []
    take = _taker(tensor, rows, len(parts))
    return [(name, take(*part)) for name, part in zip(named, parts, strict=True)]


def _taker(tensor: torch.Tensor, rows: int, count: int) -> Callable[[int, int], torch.Tensor]:
    if not is_sharded(tensor):
        whole = tensor.detach()
        return lambda number, turn: whole[number, turn * rows : (turn + 1) * rows]
    gathered = _Gathered(tensor, rows, count)
    like = torch.empty(rows, tensor.shape[2], device="meta")
    return lambda number, turn: Deferred(like, tensor.dtype, tensor.device, partial(gathered.part, number, turn))


class _Gathered:
    """A tensor that is made whole for the first of its parts, and let go of with the last."""

    def __init__(self, tensor: Any, rows: int, count: int) -> None:
        self._tensor, self._rows, self._count = tensor, rows, count
        self._whole: torch.Tensor | None = None
        self._left = count

    def part(self, number: int, turn: int) -> torch.Tensor:
        if self._whole is None:
            self._whole, self._left = self._tensor.full_tensor(), self._count
        part = self._whole[number, turn * self._rows : (turn + 1) * self._rows]
        self._left -= 1
        if self._left == 0:
            self._whole = None
        return part
