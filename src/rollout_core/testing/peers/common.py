"""What several adapters share: cutting a stream as the peers' users do, and driving the peers' coroutines."""

from __future__ import annotations

import threading
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from typing import Any, TypeAlias, TypeVar

import torch

from rollout_core.errors import RolloutCoreError

Named: TypeAlias = tuple[str, torch.Tensor]
Specs: TypeAlias = Sequence[tuple[str, torch.dtype, tuple[int, ...]]]
Slots: TypeAlias = list[tuple[str, int, int]]
T = TypeVar("T")


class WouldHangError(RolloutCoreError):
    """One side waits for a message that the other side never sends. Peers wait without limit; their adapters raise this
    instead."""


def cut_greedily(named_tensors: Iterable[Named], capacity: int) -> Iterator[list[Named]]:
    """Groups in stream order, each cut before the tensor that would take it over the capacity; a larger tensor stands alone.

    This is how slime and miles fill SGLang's buckets, whose constructor takes the list of one bucket and knows no capacity.
    """
    group: list[Named] = []
    nbytes = 0
    for name, tensor in named_tensors:
        size = tensor.numel() * tensor.element_size()
        if group and nbytes + size > capacity:
            yield group
            group, nbytes = [], 0
        group.append((name, tensor))
        nbytes += size
    if group:
        yield group


def as_given(named_tensors: Iterable[Named], buckets: Iterator[T]) -> list[T] | Iterator[T]:
    """A list for a list, so that errors come from ``pack`` itself; for an iterator, buckets as they are asked for."""
    return list(buckets) if isinstance(named_tensors, Sequence) else buckets


def copied(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of a received contiguous tensor, byte by byte: ``clone`` is not there for every dtype that can be viewed."""
    return tensor.reshape(-1).view(torch.uint8).clone().view(tensor.dtype).view(tensor.shape)


def finish(coroutine: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine that never waits, without an event loop: all awaitables under it are ready at once."""
    try:
        coroutine.send(None)
    except StopIteration as stop:
        return stop.value  # type: ignore[no-any-return]
    coroutine.close()
    raise RuntimeError("the peer's coroutine waits for an event loop; its adapter drives it without one")


def run_in_thread(call: Callable[[], T]) -> T:
    """The result of a call, made in a thread of its own, so that it may start an event loop even if one runs here."""
    result: list[T] = []
    error: list[BaseException] = []

    def target() -> None:
        try:
            result.append(call())
        except BaseException as caught:
            error.append(caught)

    thread = threading.Thread(target=target, name="peer", daemon=True)
    thread.start()
    thread.join()
    if error:
        raise error[0]
    return result[0]


def nothing(*args: object, **kwargs: object) -> None:
    """Stands in for device synchronisation and cache calls: work on the CPU is done when its call returns."""
