"""torch's own flatten and unflatten, the functions that older trainers coalesce parameters with."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from rollout_core.testing.peers.common import Named
from rollout_core.testing.peers.loading import installed_version

_utils: Any = torch._utils  # private to torch and without types; it is where its users import these functions from
VERSION = "2.13.0"


@dataclass(frozen=True)
class Parameters:
    """The receiver's own parameters, in order: ``_unflatten_dense_tensors`` takes its shapes from them."""

    names: list[str]
    like: list[torch.Tensor]


@dataclass
class Flat:
    """One flattened chunk. ``like`` are the receiver's parameters of this chunk, ``model`` all of them."""

    flat: torch.Tensor
    like: list[torch.Tensor]
    model: Parameters


class FlattenedDense:
    """``_take_tensors``, ``_flatten_dense_tensors``, ``_unflatten_dense_tensors`` and ``_reorder_tensors_as`` of torch/_utils.py.

    ``_take_tensors`` makes chunks of one type each, up to the capacity in bytes, and ``_reorder_tensors_as`` brings what comes
    out back into the order of the model; together they are torch's way to coalesce a list of mixed types. A tensor over the
    capacity is a chunk of its own. Flat chunks have the dtype of their tensors, so there are no byte buffers to look into.
    """

    capabilities = frozenset({"oversize=own"})

    def __init__(self) -> None:
        installed_version("torch", VERSION)

    def pack(self, named_tensors: list[Named], capacity: int) -> list[Flat]:
        tensors = [tensor for _, tensor in named_tensors]
        model = Parameters([name for name, _ in named_tensors], [torch.empty_like(tensor) for tensor in tensors])
        # Chunks hold the tensors and not their places: one object under two names takes its places one after the other.
        places: dict[int, deque[int]] = defaultdict(deque)
        for place, tensor in enumerate(tensors):
            places[id(tensor)].append(place)
        return [
            Flat(_utils._flatten_dense_tensors(chunk), [model.like[places[id(tensor)].popleft()] for tensor in chunk], model)
            for chunk in _utils._take_tensors(tensors, capacity)
        ]

    def unpack(self, buckets: Iterable[Flat]) -> list[Named]:
        buckets = list(buckets)
        if not buckets:
            return []
        model = buckets[0].model
        tensors = [tensor for bucket in buckets for tensor in _utils._unflatten_dense_tensors(bucket.flat, bucket.like)]
        return list(zip(model.names, _utils._reorder_tensors_as(tensors, model.like), strict=True))

    def bucket_nbytes(self, bucket: Flat) -> int:
        return bucket.flat.nbytes
