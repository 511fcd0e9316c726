"""One-line adapters that make a packer under test of what is none: ``packer = grouping_packer(get_named_tensor_buckets)``."""

from __future__ import annotations

from collections.abc import AsyncIterable, Callable, Collection, Coroutine, Iterable, Iterator, Mapping, Sequence
from typing import Any

from rollout_core.testing.packers import Pairs, collect, run_async

#: (named tensors, capacity in bytes) -> buckets, each a list of (name, tensor) or a mapping; sync or async.
Grouping = Callable[[Any, int], Any]


class _FunctionsPacker:
    def __init__(self, pack: Grouping, unpack: Callable[[Sequence[Any]], Iterable[Any]], capabilities: frozenset[str]) -> None:
        self._pack = pack
        self._unpack = unpack
        self.capabilities = capabilities

    def pack(self, named: Any, capacity: int) -> Iterable[Any]:
        return _buckets(self._pack(named, capacity))

    def unpack(self, buckets: Sequence[Any]) -> Pairs:
        return list(self._unpack(buckets))


def grouping_packer(function: Grouping, *, capabilities: Collection[str] = ()) -> Any:
    """A packer under test of a function that only groups: ``function(named_tensors, capacity)`` gives (or yields, sync or async)
    buckets that are lists of (name, tensor) or mappings. What comes out is what is in the buckets. ``capabilities``: what the
    function claims beyond that, for example ``{"iterators", "oversize=own"}``.

    A function with other arguments takes a lambda: ``grouping_packer(lambda named, capacity: group(named, mb=capacity / 2**20))``.
    """
    return _FunctionsPacker(function, _ungrouped, frozenset(capabilities))


def functions_packer(
    pack: Grouping, unpack: Callable[[Sequence[Any]], Iterable[Any]], *, capabilities: Collection[str] = ()
) -> Any:
    """A packer under test of two functions, ``pack(named_tensors, capacity)`` (sync or async) and ``unpack(buckets)``."""
    return _FunctionsPacker(pack, unpack, frozenset(capabilities))


def _buckets(result: Any) -> Iterable[Any]:
    """The buckets that a function gave: an iterable, an async iterable, or a coroutine that gives one."""
    if isinstance(result, Coroutine):
        return _buckets(run_async(result))
    if isinstance(result, AsyncIterable):
        collected: list[Any] = run_async(collect(result))
        return collected
    return _lazily(result)


def _lazily(buckets: Iterable[Any]) -> Iterator[Any]:
    yield from buckets


def _ungrouped(buckets: Sequence[Any]) -> Iterator[Any]:
    for bucket in buckets:
        yield from bucket.items() if isinstance(bucket, Mapping) else bucket
