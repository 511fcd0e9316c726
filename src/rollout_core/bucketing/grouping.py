"""iter_buckets and aiter_buckets: lists of named tensors of a bounded size, for trainers that pack the bytes themselves."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Iterator

from rollout_core.bucketing.copying import conform
from rollout_core.bucketing.placement import Options, Oversize
from rollout_core.bucketing.sources import AnySource, Pair, Source, Step, adrive, drive, in_loop, named_pairs
from rollout_core.bucketing.specs import next_spec
from rollout_core.bucketing.tensors import own_copy
from rollout_core.errors import CapacityError


def iter_buckets(source: Source, capacity: int, *, oversize: Oversize = "own", copy: bool = True) -> Iterator[list[Pair]]:
    """Lists of (name, tensor) in source order, each of at most ``capacity`` bytes of tensor data.

    A drop-in for grouping functions such as verl's ``get_named_tensor_buckets`` (a bucket is cut when the next tensor would
    exceed the capacity; a tensor larger than it comes alone). ``oversize`` is ``own`` or ``error``: nothing is split here.

    With ``copy`` every tensor is a contiguous copy with a storage of its own, made before the next is asked for, so that neither a
    source that reuses its memory nor a later write changes a bucket: the cost is one bucket of memory. ``copy=False`` hands the
    source's own tensors on (sharded ones gathered) and is for a source that keeps them unchanged.

    Raises ``CapacityError``, ``DuplicateNameError``, ``SourceError``, or whatever the source raises.
    """
    return drive(_steps(_options(capacity, oversize), copy), named_pairs(source))


def aiter_buckets(source: AnySource, capacity: int, *, oversize: Oversize = "own", copy: bool = True) -> AsyncIterator[list[Pair]]:
    """``iter_buckets`` for sync and async sources."""
    if not isinstance(source, AsyncIterable):
        return in_loop(iter_buckets(source, capacity, oversize=oversize, copy=copy))
    return adrive(_steps(_options(capacity, oversize), copy), source)


def _options(capacity: int, oversize: Oversize) -> Options:
    if oversize == "split":
        raise ValueError("oversize is 'split', and a list of whole tensors cannot hold a piece; pass 'own' or 'error'")
    return Options(capacity=capacity, oversize=oversize)


def _steps(options: Options, copy: bool) -> Step[list[Pair]]:
    bucket: list[Pair] = []
    filled = 0
    places: dict[str, int] = {}
    while items := (yield 1):
        name, tensor = items.pop()
        spec = next_spec(name, tensor, places)
        if spec.nbytes > options.capacity and options.oversize == "error":
            raise CapacityError(
                f"tensor {name!r} ({spec}, {spec.nbytes} bytes) is larger than the capacity of {options.capacity} bytes; "
                "raise the capacity or pass oversize='own'"
            )
        if bucket and filled + spec.nbytes > options.capacity:
            yield bucket
            bucket, filled = [], 0
        plain = conform(spec, tensor)
        bucket.append((name, own_copy(plain) if copy else plain))
        filled += spec.nbytes
        del tensor, plain
    if bucket:
        yield bucket
