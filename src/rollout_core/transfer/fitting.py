"""What a model's tensors have to be for an update to be loaded into them."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch

from rollout_core.bucketing.tensors import as_bytes, is_sharded
from rollout_core.errors import PlanMismatchError


def check_memory(name: str, mine: torch.Tensor) -> None:
    """Raise ``PlanMismatchError`` for a tensor of the model that nothing can be loaded into."""
    why = None
    if mine.is_meta:
        why = "is on the meta device and has no memory; call to_empty() on the model"
    elif is_sharded(mine):
        why = "is a DTensor, of which this rank has a part; updates are of whole tensors"
    elif any(size > 1 and stride == 0 for size, stride in zip(mine.shape, mine.stride(), strict=True)):
        why = "is expanded: several of its elements are one, and cannot be written"
    if why is not None:
        raise PlanMismatchError(f"the model's tensor {name!r} {why}")


def check_apart(tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise ``PlanMismatchError`` if two tensors of a model share a part of their memory, and are not one: what is loaded into the
    first would be changed with the second. Looks at those without gaps; between others there may be elements in turns."""
    dense = [(name, mine) for name, mine in tensors.items() if mine.numel() and mine.is_contiguous()]
    places = sorted((str(mine.device), mine.data_ptr(), mine.data_ptr() + mine.nbytes, name) for name, mine in dense)
    for (device, start, end, name), (other_device, other_start, other_end, other) in pairwise(places):
        if device == other_device and other_start < end and (start, end) != (other_start, other_end):
            raise PlanMismatchError(
                f"the model's tensors {name!r} and {other!r} share a part of their memory, and are not one tensor"
            )


def check_tied(first: str, one: torch.Tensor, second: str, other: torch.Tensor) -> None:
    """Raise ``PlanMismatchError`` unless these values for one tensor of the model are the same, bit for bit."""
    if not torch.equal(as_bytes(one), as_bytes(other).to(one.device)):
        raise PlanMismatchError(
            f"{first!r} and {second!r} are one tensor in the model, and the update has different values for them"
        )
