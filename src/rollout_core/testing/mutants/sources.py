"""Bugs in how a source is read, and packers that do not come back."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator, Mapping
from typing import Any

import torch

from rollout_core.testing.mutants.registry import mutant
from rollout_core.testing.reference import RefBucket, ReferencePacker, Stream


@mutant("B16-iterator")
class ReadsTwice(ReferencePacker):
    """Goes over its source once to count and once to pack."""

    def pairs(self, source: Any) -> Iterable[tuple[str, torch.Tensor]]:
        if isinstance(source, Iterator):
            sum(1 for _ in source)
        return super().pairs(source)


@mutant("B16-async")
class StopsOneShort(ReferencePacker):
    """Fetches the next tensor of an async source ahead, and leaves the last one where it is."""

    async def apack(self, source: AsyncIterable[tuple[str, torch.Tensor]], capacity: int) -> AsyncIterator[RefBucket]:
        async def short() -> AsyncIterator[tuple[str, torch.Tensor]]:
            ahead = None
            async for pair in source:
                if ahead is not None:
                    yield ahead
                ahead = pair

        async for bucket in super().apack(short(), capacity):
            yield bucket


@mutant("B16-async-error")
class EndsWithItsSource(ReferencePacker):
    """Takes an error of an async source for its end."""

    async def apack(self, source: AsyncIterable[tuple[str, torch.Tensor]], capacity: int) -> AsyncIterator[RefBucket]:
        async def quiet() -> AsyncIterator[tuple[str, torch.Tensor]]:
            try:
                async for pair in source:
                    yield pair
            except Exception:
                return

        async for bucket in super().apack(quiet(), capacity):
            yield bucket


@mutant("B16-mapping")
class TakesKeysOnly(ReferencePacker):
    """Sorts a mapping by name."""

    def pairs(self, source: Any) -> Iterable[tuple[str, torch.Tensor]]:
        return sorted(source.items(), reverse=True) if isinstance(source, Mapping) else super().pairs(source)


@mutant("B16-module", "verl#5688")
class LeavesBuffersBehind(ReferencePacker):
    """Sends a module's parameters and not its buffers."""

    def pairs(self, source: Any) -> Iterable[tuple[str, torch.Tensor]]:
        if isinstance(source, torch.nn.Module):
            return list(source.named_parameters(remove_duplicate=False))
        return super().pairs(source)


@mutant("B16-module")
class ForgetsTiedParameters(ReferencePacker):
    """Asks a module for its parameters as it gives them by itself: each once."""

    def pairs(self, source: Any) -> Iterable[tuple[str, torch.Tensor]]:
        if isinstance(source, torch.nn.Module):
            return [*source.named_parameters(), *source.named_buffers()]
        return super().pairs(source)


@mutant("B16-module")
class ForgetsChildren(ReferencePacker):
    """Sends what a module holds itself, and nothing of its children."""

    def pairs(self, source: Any) -> Iterable[tuple[str, torch.Tensor]]:
        if isinstance(source, torch.nn.Module):
            parameters = source.named_parameters(recurse=False, remove_duplicate=False)
            return [*parameters, *source.named_buffers(recurse=False)]
        return super().pairs(source)


@mutant("B16-error")
class WrapsErrors(ReferencePacker):
    """Raises its own error for one of the source."""

    def pack(self, source: Any, capacity: int, groups: Iterable[Iterable[str]] = ()) -> Iterator[RefBucket]:
        try:
            yield from super().pack(source, capacity, groups)
        except Exception as error:
            raise RuntimeError(f"packing failed: {error}") from error


@mutant("B16-error")
class SendsWhatItHas(ReferencePacker):
    """Sends the bucket under way when its source breaks, and raises afterwards."""

    def pack(self, source: Any, capacity: int, groups: Iterable[Iterable[str]] = ()) -> Iterator[RefBucket]:
        self.version += 1
        stream = self.stream(self, capacity, groups, ties=not isinstance(source, Iterator))
        try:
            for name, tensor in self.pairs(source):
                yield from stream.add(name, tensor)
        except Exception:
            yield from stream.finish()
            raise
        yield from stream.finish()


@mutant("B16-close")
class LeavesSourcesOpen(ReferencePacker):
    """Reads its source in a place that outlives the round."""

    def __init__(self) -> None:
        super().__init__()
        self.sources: list[Any] = []

    def pairs(self, source: Any) -> Iterable[tuple[str, torch.Tensor]]:
        pairs = iter(super().pairs(source))
        self.sources.append(pairs)

        def one_by_one() -> Iterator[tuple[str, torch.Tensor]]:
            while True:
                try:
                    yield next(pairs)
                except StopIteration:
                    return

        return one_by_one()


@mutant("B12-empty", "hangs: vllm#31943")
class WaitsForTheFirst(ReferencePacker):
    """Waits without end for the first tensor."""

    class stream(Stream):
        def finish(self) -> list[RefBucket]:
            while not self.names:
                time.sleep(0.01)
            return super().finish()


@mutant("B2-capacity")
class HangsOnAnExactFit(ReferencePacker):
    """Never ends when a bucket is exactly full."""

    class stream(Stream):
        def place(self, unit: list[tuple[str, torch.Tensor]]) -> None:
            super().place(unit)
            while len(self.data) == self.capacity and len(self.entries) > 1:
                time.sleep(0.01)


@mutant("B1-scalars")
class DiesOfScalars(ReferencePacker):
    """Ends its process at a tensor of no dimensions."""

    def content(self, tensor: torch.Tensor) -> bytes:
        if not tensor.dim():
            os._exit(3)
        return super().content(tensor)
