"""Sources: anything that holds named tensors, turned into an iterator of pairs, and the two drivers (sync and async) that feed
pairs to the packers."""

from __future__ import annotations

import os
from collections.abc import AsyncIterable, AsyncIterator, Generator, Iterable, Iterator, Mapping
from contextlib import suppress
from itertools import islice
from typing import Any, TypeAlias, TypeVar

import torch

from rollout_core.errors import SourceError

Pair: TypeAlias = tuple[str, torch.Tensor]
#: What packs without an event loop. A ``str`` or path names a safetensors file, or a folder of them.
Source: TypeAlias = Iterable[Pair] | Mapping[str, torch.Tensor] | torch.nn.Module | str | os.PathLike[str]
AnySource: TypeAlias = Source | AsyncIterable[Pair]
T = TypeVar("T")
#: A packer as a generator: it yields how many pairs it wants and is sent a list of at most that many (fewer only at the end),
#: or it yields a finished result and is sent None. The drivers below do the waiting, so that one packer serves both worlds.
Step: TypeAlias = Generator[int | T, list[Pair] | None, None]


def check_name(name: Any) -> None:
    """Raise ``SourceError`` unless ``name`` is a non-empty str."""
    if not isinstance(name, str):
        raise SourceError(f"a tensor's name is {name!r} ({type(name).__name__}); names are non-empty str")
    if not name:
        raise SourceError("a tensor has the empty name; names are non-empty str")


def open_checkpoint(path: str | os.PathLike[str]) -> Mapping[str, torch.Tensor]:
    """A safetensors file or folder as a mapping that reads one tensor at a time."""
    # The only door from here to a file; the module behind it is the only one in this package that opens one.
    from rollout_core.bucketing.checkpoint import SafetensorsSource

    return SafetensorsSource(path)


def as_mapping(source: Source) -> Mapping[str, torch.Tensor] | None:
    """The source as a mapping by name, or None if its pairs come one after the other."""
    if isinstance(source, torch.nn.Module):
        return dict(_module_pairs(source))
    if isinstance(source, str | os.PathLike):
        return open_checkpoint(source)
    return source if isinstance(source, Mapping) else None


def named_pairs(source: Source) -> Iterator[Pair]:
    """The pairs of a source, one after the other, in its own order."""
    mapping = as_mapping(source)
    if mapping is not None:
        return iter(mapping.items())
    if isinstance(source, torch.Tensor) or not isinstance(source, Iterable):
        raise SourceError(
            f"a {type(source).__name__} is no source of named tensors; pass pairs (name, tensor), a mapping, a module or a path"
            + (" (an async source needs apack, apack_stream or aiter_buckets)" if isinstance(source, AsyncIterable) else "")
        )
    return _checked_pairs(source)


def _module_pairs(module: torch.nn.Module) -> Iterator[Pair]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _not_a_pair(item: Any) -> SourceError:
    return SourceError(f"the source gave a {type(item).__name__}, not a pair (name, tensor)")


def _checked_pairs(items: Iterable[Any]) -> Iterator[Pair]:
    """The pairs of an iterable; closing this closes a generator underneath, so that what it holds open is released."""
    try:
        for item in items:
            if type(item) is not tuple or len(item) != 2:
                if not isinstance(item, list | tuple) or len(item) != 2:
                    raise _not_a_pair(item)
                item = tuple(item)
            yield item
            del item  # or the last tensor stays alive while the source makes the next
    finally:
        close = getattr(items, "close", None)
        if close is not None and isinstance(items, Iterator):
            close()


async def _async_pairs(items: AsyncIterable[Any]) -> AsyncIterator[Pair]:
    try:
        async for item in items:
            if not isinstance(item, list | tuple) or len(item) != 2:
                raise _not_a_pair(item)
            yield item[0], item[1]
            del item
    finally:
        close = getattr(items, "aclose", None)
        if close is not None and isinstance(items, AsyncIterator):
            await close()


def drive(step: Step[T], pairs: Iterator[Pair]) -> Iterator[T]:
    """Run a packer on an iterator. Both are closed when this is, whoever ends first and however."""
    reply: list[Pair] | None = None
    try:
        while True:
            try:
                want = step.send(reply)
            except StopIteration:
                return
            reply = None  # tensors that were copied are free again before the next are asked for
            if isinstance(want, int):
                reply = list(islice(pairs, want))
            else:
                yield want
                del want  # a bucket that the caller dropped is free again while the next one is packed
    finally:
        step.close()
        close = getattr(pairs, "close", None)
        if close is not None:
            close()


async def in_loop(results: Iterator[T]) -> AsyncIterator[T]:
    """The results of a sync packer, for ``async for``."""
    try:
        for result in results:
            yield result
            del result
    finally:
        results.close()  # type: ignore[attr-defined]


async def adrive(step: Step[T], source: AsyncIterable[Pair]) -> AsyncIterator[T]:
    """``drive`` for async sources."""
    pairs = _async_pairs(source)
    reply: list[Pair] | None = None
    try:
        while True:
            try:
                want = step.send(reply)
            except StopIteration:
                return
            reply = None
            if isinstance(want, int):
                reply = []
                with suppress(StopAsyncIteration):
                    while len(reply) < want:
                        reply.append(await anext(pairs))
            else:
                yield want
                del want
    finally:
        step.close()
        await pairs.aclose()  # type: ignore[attr-defined]
