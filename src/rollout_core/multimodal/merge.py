"""Rules that put the outputs of single items together, one rule per output key, with the bytes of one call over all items.

A rule for an output (``Cat``, ``PadCat``) takes the tensors of the items in token order. A rule for a sequence (``PerToken``,
``Rebuild``) takes where the items' feature tokens are. No rule does arithmetic on values: bytes are moved, so NaN payloads and
the sign of zero survive. Every rule checks what it gets and names the key.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from rollout_core.errors import UnsupportedProcessorError

#: The spans of one item: ``(start, stop)`` of each run of its feature tokens.
Spans: TypeAlias = Sequence[tuple[int, int]]
Outputs: TypeAlias = Mapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Cat:
    """Concatenate along ``dim``. All other sizes are equal, or it is an error: nothing is padded, cropped or broadcast."""

    dim: int = 0

    def merge(self, key: str, values: Sequence[torch.Tensor]) -> torch.Tensor:
        """One new tensor. ``UnsupportedProcessorError`` if dtype, number of dimensions or another size differs."""
        _check_alike(key, values)
        dim = _dims(key, values[0], (self.dim,))[0]
        _check_sizes(key, values, {dim})
        return torch.cat(list(values), dim)


@dataclass(frozen=True, slots=True)
class PadCat:
    """Pad every item at the end of ``pads`` up to the largest one with ``value``, then concatenate along ``dim``."""

    pads: tuple[int, ...]
    dim: int = 0
    value: float = 0.0

    def merge(self, key: str, values: Sequence[torch.Tensor]) -> torch.Tensor:
        """One new tensor. ``UnsupportedProcessorError`` if dtype, number of dimensions or a size that is neither padded nor joined
        differs."""
        _check_alike(key, values)
        dim, *pads = _dims(key, values[0], (self.dim, *self.pads))
        _check_sizes(key, values, {dim, *pads})
        shape = list(values[0].shape)
        for axis in pads:
            shape[axis] = max(value.shape[axis] for value in values)
        shape[dim] = sum(value.shape[dim] for value in values)
        merged = values[0].new_full(shape, self.value)
        at = 0
        for value in values:
            place = merged.narrow(dim, at, value.shape[dim])
            for axis in pads:
                place = place.narrow(axis, 0, value.shape[axis])
            place.copy_(value)
            at += value.shape[dim]
        return merged


@dataclass(frozen=True, slots=True)
class PerToken:
    """One number per token, int64 ``(1, length)``: the value of an item's modality on its feature tokens, 0 elsewhere.

    transformers finds those tokens by id (5.23, processing_utils.py, ``ProcessorMixin.create_mm_token_type_ids``). Here they are
    the items' spans, so an id that the policy sampled is text.
    """

    values: tuple[tuple[str, int], ...]

    def merge(self, key: str, length: int, items: Sequence[tuple[str, Outputs]], spans: Sequence[Spans]) -> torch.Tensor:
        """``UnsupportedProcessorError`` for a modality that has no value, or a span outside the sequence."""
        known = dict(self.values)
        types = torch.zeros(1, length, dtype=torch.int64)
        for (modality, _), runs in zip(items, spans, strict=True):
            if modality not in known:
                raise UnsupportedProcessorError(f"output {key!r} has no value for tokens of modality {modality!r}, only {known}")
            for start, stop in runs:
                _check_span(key, start, stop, length)
                types[0, start:stop] = known[modality]
        return types


@dataclass(frozen=True, slots=True)
class Rebuild:
    """Computed anew for the whole sequence, because it says where the items stand in it.

    ``function(length, items, spans)`` gives the tensor; without items the key is absent, as in the processor's own output.
    """

    function: Callable[[int, Sequence[Outputs], Sequence[Spans]], torch.Tensor]

    def merge(self, key: str, length: int, items: Sequence[tuple[str, Outputs]], spans: Sequence[Spans]) -> torch.Tensor | None:
        """None without items. ``UnsupportedProcessorError`` for a span outside the sequence."""
        for runs in spans:
            for start, stop in runs:
                _check_span(key, start, stop, length)
        return self.function(length, [outputs for _, outputs in items], spans) if items else None


OutputRule: TypeAlias = Cat | PadCat
SequenceRule: TypeAlias = PerToken | Rebuild


def _check_alike(key: str, values: Sequence[Any]) -> None:
    if not values:
        raise UnsupportedProcessorError(f"output {key!r} has no value to merge")
    for index, value in enumerate(values):
        if not isinstance(value, torch.Tensor):
            raise UnsupportedProcessorError(f"output {key!r} of item {index} is a {type(value).__name__}; the rules merge tensors")
        first = values[0]
        if value.dtype != first.dtype:
            raise UnsupportedProcessorError(f"output {key!r} is {first.dtype} in item 0 and {value.dtype} in item {index}")
        if value.ndim != first.ndim:
            raise UnsupportedProcessorError(
                f"output {key!r} has {first.ndim} dimensions in item 0 and {value.ndim} in item {index}: "
                f"{_shape(first)}, {_shape(value)}"
            )


def _dims(key: str, value: torch.Tensor, dims: Sequence[int]) -> list[int]:
    """The dimensions counted from the front, each once and in range."""
    counted = [dim + value.ndim if dim < 0 else dim for dim in dims]
    if len(set(counted)) < len(counted) or not all(0 <= dim < value.ndim for dim in counted):
        raise UnsupportedProcessorError(f"output {key!r} has shape {_shape(value)}, so its rule cannot use dimensions {list(dims)}")
    return counted


def _check_sizes(key: str, values: Sequence[torch.Tensor], free: set[int]) -> None:
    first = values[0]
    for index, value in enumerate(values):
        for dim in range(first.ndim):
            if dim not in free and value.shape[dim] != first.shape[dim]:
                raise UnsupportedProcessorError(
                    f"output {key!r} has shape {_shape(first)} in item 0 and {_shape(value)} in item {index}; they must be equal "
                    f"in dimension {dim}. If one call of the processor takes both items, the rule for this key is wrong"
                )


def _check_span(key: str, start: int, stop: int, length: int) -> None:
    if not 0 <= start < stop <= length:
        raise UnsupportedProcessorError(f"output {key!r}: the span ({start}, {stop}) is not inside a sequence of {length} tokens")


def _shape(value: torch.Tensor) -> list[int]:
    return list(value.shape)
