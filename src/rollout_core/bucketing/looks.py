"""Whether many tensors still look as they did: for thousands of small ones, each attribute by itself takes longer than copying."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from operator import attrgetter
from typing import Any, Final, TypeAlias

import numpy as np
import torch

from rollout_core.bucketing.tensors import PLAIN_TYPES

#: Called with tensors: whether each looks like the one in its place did. False may also mean that it cannot be told.
Alike: TypeAlias = Callable[..., bool]
_LAYOUT: Final = attrgetter("layout")
_IS_NESTED: Final = attrgetter("is_nested")


def alike_to(tensors: Sequence[torch.Tensor]) -> Alike | None:
    """A check for tensors of as many: type, dtype, shape, strides, device, layout, conjugate and negative bits, but not where they
    lie, nor their values. It keeps no tensor. None where there is no quick one, as for one tensor that comes twice."""
    kind = _guards()
    # It ends the process where a tensor has no shape or strides, as nested and some sparse ones: it is not asked about those.
    is_plain = PLAIN_TYPES.issuperset(map(type, tensors)) and {torch.strided}.issuperset(map(_LAYOUT, tensors))
    if kind is None or not is_plain or any(map(_IS_NESTED, tensors)):
        return None
    check: Alike = kind(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None).check

    def alike(*others: Any) -> bool:
        try:
            return not any(map(_IS_NESTED, others)) and check(*others)
        except AttributeError:  # something else than a tensor
            return False

    return alike if check(*tensors) else None


class Seen:
    """Which tensors had which names, what they looked like and where they lay, to be held against those of later. It keeps none."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._names = list(tensors)
        self._turns, one_each = _turns(tensors)
        self._alike = alike_to(one_each)
        self._places = _places(one_each if self._alike is not None else ())

    def same(self, tensors: Mapping[str, torch.Tensor]) -> bool:
        """Whether these are no other: values apart, nothing can be told from them that could not be told then."""
        if self._alike is None or list(tensors) != self._names:
            return False
        turns, one_each = _turns(tensors)
        return turns == self._turns and self._alike(*one_each) and np.array_equal(_places(one_each), self._places)


def _turns(tensors: Mapping[str, torch.Tensor]) -> tuple[list[int], list[torch.Tensor]]:
    """For each name the number of its tensor among them all, and these: one may have several names."""
    numbers: dict[int, int] = {}
    turns = [numbers.setdefault(id(tensor), len(numbers)) for tensor in tensors.values()]
    return turns, list({id(tensor): tensor for tensor in tensors.values()}.values())


def _places(tensors: Sequence[torch.Tensor]) -> Any:
    return np.fromiter(map(torch.Tensor.data_ptr, tensors), np.int64, len(tensors))


@cache
def _guards() -> Any:
    """``TensorGuards``, by which ``torch.compile`` checks its inputs in one call, if this torch has it, and it sees what it is here
    for: it is none of torch's public names."""
    try:
        from torch._C._dynamo.guards import TensorGuards

        guards: Any = TensorGuards  # whose stub does not say that it takes tensors

        def sees(before: torch.Tensor, after: torch.Tensor) -> bool:
            check: Alike = guards(before, dynamic_dims_sizes=None, dynamic_dims_strides=None).check
            return check(before) and check(before.clone()) and not check(after)

        with torch.inference_mode(False):  # whatever is on where it is first asked
            square = torch.zeros(2, 2, dtype=torch.int32, device="cpu")
            real, pair = square.view(torch.float32), torch.zeros(2, dtype=torch.complex64, device="cpu")
            others = [
                *((square, other) for other in (square.t(), square.view(4), square[:1], real, square.to("meta"))),
                *((real, other) for other in (torch._neg_view(real), torch.nn.Parameter(real), real.to_sparse())),
                (pair, pair.conj()),
            ]
            return guards if all(sees(before, after) for before, after in others) else None
    except Exception:  # whatever another version of torch raises
        return None
