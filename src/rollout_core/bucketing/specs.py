"""TensorSpec, and finding the specs of anything that holds named tensors."""

from __future__ import annotations

import math
import os
import weakref
from collections.abc import Iterable, Sequence
from itertools import compress
from operator import attrgetter, eq, is_
from typing import TYPE_CHECKING, Any, Final

import msgspec
import torch

from rollout_core.bucketing.dtypes import ITEMSIZES
from rollout_core.bucketing.sources import Source, check_name, named_pairs, open_checkpoint
from rollout_core.bucketing.tensors import PLAIN_TYPES, check_describable, describe, view_key
from rollout_core.errors import CapacityError, DuplicateNameError, SourceError

if TYPE_CHECKING:
    from collections.abc import Iterator

#: No tensor is larger than what a signed 64-bit offset can address.
MAX_NBYTES = 2**63 - 1
#: More dimensions than any tensor in use has; products of sizes stay cheap however hostile they are.
MAX_DIMS = 64

_NAME: Final = attrgetter("name")
_DTYPE: Final = attrgetter("dtype")
_SHAPE: Final = attrgetter("shape")
_LAYOUT: Final = attrgetter("layout")


class TensorSpec(msgspec.Struct, frozen=True, gc=False):
    """Name, dtype and shape of one tensor, without its data.

    ``alias_of`` names the tensor whose storage and view this one is (tied weights): it then travels as another name for it.
    Raises ``SourceError`` for an empty name, a dtype that does not travel or a shape that is no tuple of sizes.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    alias_of: str | None = None

    def __post_init__(self) -> None:
        check_name(self.name)
        itemsize = ITEMSIZES.get(self.dtype)
        if itemsize is None:
            raise SourceError(f"tensor {self.name!r} has dtype {self.dtype}, which does not travel")
        if not isinstance(self.shape, tuple):
            raise SourceError(f"tensor {self.name!r} has shape {self.shape!r}, which is no tuple of sizes >= 0")
        if len(self.shape) > MAX_DIMS:
            raise SourceError(f"tensor {self.name!r} has {len(self.shape)} dimensions; at most {MAX_DIMS} travel")
        extent = itemsize
        for size in self.shape:
            if type(size) is not int or size < 0:
                raise SourceError(f"tensor {self.name!r} has shape {tuple(self.shape)!r}, which is no tuple of sizes >= 0")
            extent *= size or 1  # torch counts an empty dimension as one when it makes strides
        if extent > MAX_NBYTES:
            raise CapacityError(f"tensor {self.name!r} ({self}) is larger than 2**63 - 1 bytes")

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor when contiguous."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        return describe(self.dtype, self.shape)


def specs_of(source: Source, *, aliases: bool = True) -> list[TensorSpec]:
    """The specs of a source, in its order: pairs, a mapping, a module, a state dict, or a path to safetensors.

    A module gives its parameters and then its buffers, non-persistent ones included: a worker that lacks a buffer computes with
    a wrong one. Sharded tensors (DTensor) are described by their global shape and not gathered; meta tensors are fine. With
    ``aliases`` tensors that are the same storage and view are declared tied; the packer checks it again against the data.

    Raises ``SourceError`` for anything that is not bytes in memory and ``DuplicateNameError`` for a name that comes twice.
    """
    if isinstance(source, str | os.PathLike):
        source = open_checkpoint(source)
    headers = getattr(type(source), "__tensor_specs__", None)
    if headers is not None:  # a file read lazily knows its specs without its data
        known: list[TensorSpec] = headers(source)
        return known if aliases else [TensorSpec(spec.name, spec.dtype, spec.shape) for spec in known]
    specs = [
        TensorSpec(name, tensor.dtype, tuple(tensor.shape), alias_of if aliases else None)
        for name, tensor, alias_of in _with_aliases(named_pairs(source))
    ]
    check_unique(specs)
    return specs


def are_specs_of(specs: Sequence[TensorSpec], source: Source) -> bool:
    """Whether ``specs_of(source)`` gives just these, found out in a fraction of its time, for an update like the last. False may
    also mean that this source is not looked at so quickly: only modules, dicts and lists of plain tensors are."""
    if not isinstance(source, torch.nn.Module | dict | list | tuple):
        return False
    pairs = list(named_pairs(source))
    names, tensors = [name for name, _ in pairs], [tensor for _, tensor in pairs]
    try:
        alike = (
            names == list(map(_NAME, specs))
            and PLAIN_TYPES.issuperset(map(type, tensors))
            and {torch.strided}.issuperset(map(_LAYOUT, tensors))
            and all(map(is_, map(_DTYPE, tensors), map(_DTYPE, specs)))  # which no quantized tensor has
            and all(map(eq, map(_SHAPE, tensors), map(_SHAPE, specs)))
        )
        return alike and _tied_as(specs, pairs, list(map(torch.Tensor.data_ptr, tensors)))
    except RuntimeError:  # a nested tensor, which has no shape, or one without memory, which has no address
        return False


def _tied_as(specs: Sequence[TensorSpec], pairs: Sequence[tuple[str, torch.Tensor]], places: Sequence[int]) -> bool:
    """Whether these tensors, which are alive, are tied as the specs say. Only those at one address can be."""
    if len(set(places)) == len(places):
        return all(spec.alias_of is None for spec in specs)
    counts: dict[int, int] = {}
    for place in places:
        counts[place] = counts.get(place, 0) + 1
    shared = [counts[place] > 1 for place in places]
    found = dict.fromkeys(map(_NAME, specs))
    found.update((name, alias_of) for name, _, alias_of in _with_aliases(compress(pairs, shared)))
    return all(spec.alias_of == found[spec.name] for spec in specs)


def _with_aliases(pairs: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, torch.Tensor, str | None]]:
    """Each pair with the earlier name of the same view. Only tensors alive right now are compared: a freed one's memory is
    used again by the next, and a generator may yield one scratch buffer under many names."""
    seen: dict[tuple[Any, ...], tuple[str, weakref.ref[torch.Tensor]]] = {}
    for name, tensor in pairs:
        check_describable(name, tensor)
        key = view_key(tensor)
        alias_of = None
        if key is not None:
            first = seen.get(key)
            if first is not None and first[1]() is not None:
                alias_of = first[0]
            else:
                seen[key] = (name, weakref.ref(tensor))
        yield name, tensor, alias_of


def check_unique(specs: Iterable[TensorSpec]) -> None:
    """Raise ``DuplicateNameError`` naming both places of a name that comes twice."""
    places: dict[str, int] = {}
    for place, spec in enumerate(specs):
        first = places.setdefault(spec.name, place)
        if first != place:
            raise duplicate_name(spec.name, first, place)


def next_spec(name: str, tensor: torch.Tensor, places: dict[str, int]) -> TensorSpec:
    """The spec of the next tensor of a stream, its name noted in ``places`` (name -> place), or the error of ``specs_of``."""
    check_describable(name, tensor)
    spec = TensorSpec(name, tensor.dtype, tuple(tensor.shape))
    place = len(places)
    first = places.setdefault(name, place)
    if first != place:
        raise duplicate_name(name, first, place)
    return spec


def duplicate_name(name: str, first: int, second: int) -> DuplicateNameError:
    return DuplicateNameError(f"name {name!r} stands at places {first} and {second} of the source; names must be unique")
