"""The memory of a model's weights, let go and taken again without them."""

from __future__ import annotations

import gc
from collections.abc import Iterable

import torch

from rollout_core.bucketing.tensors import view_key


def reserved(device: torch.device, *, emptied: bool = False) -> int | None:
    """Bytes of a GPU that torch has for this process; ``emptied``: once what is free of them was given back. None on a CPU, where
    nothing is kept."""
    if device.type != "cuda":
        return None
    if emptied:
        gc.collect()
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
    return torch.cuda.memory_reserved(device)


class ReleasedWeights:
    """Tensors whose memory is let go: they are empty until ``resume``, and hold anything after it. What was one tensor under two
    names, or shared its memory with another as a whole, does so again."""

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        self.nbytes = 0  # that were let go
        self._shapes: list[tuple[torch.Tensor, torch.Size, int]] = []  # and the place of the one that it is one with
        places: dict[object, int] = {}
        for tensor in {id(tensor): tensor for tensor in tensors if tensor.numel()}.values():
            place = places.setdefault(view_key(tensor), len(self._shapes))
            if place == len(self._shapes):
                self.nbytes += tensor.nbytes
            self._shapes.append((tensor, tensor.shape, place))
        for tensor, _, _ in self._shapes:
            tensor.data = tensor.data.new_empty(0)

    def resume(self) -> None:
        """Take the memory again."""
        for place, (tensor, shape, first) in enumerate(self._shapes):
            tensor.data = tensor.data.new_empty(shape) if place == first else self._shapes[first][0].data
