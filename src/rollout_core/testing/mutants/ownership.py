"""Bugs in who owns which memory, and how much of it is kept."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import ClassVar

import torch

from rollout_core.testing.mutants.registry import mutant
from rollout_core.testing.packers import Pairs
from rollout_core.testing.reference import RefBucket, ReferencePacker, Stream


@mutant("B8-sources", "verl get_named_tensor_buckets (verl#6733, #7139)")
class KeepsTheSource(ReferencePacker):
    """Sends a bucket of one plain tensor as that tensor's own memory."""

    def __init__(self) -> None:
        super().__init__()
        self.alone: torch.Tensor | None = None

    def content(self, tensor: torch.Tensor) -> bytes:
        plain = tensor.is_contiguous() and not tensor.is_neg() and not tensor.is_conj() and tensor.numel()
        self.alone = tensor.detach().view(-1).view(torch.uint8) if plain else None
        return super().content(tensor)

    def buffer_of(self, data: bytes) -> torch.Tensor:
        if self.alone is not None and self.alone.numel() == len(data):
            return self.alone
        return super().buffer_of(data)


@mutant("B8-rounds", "ms-swift#10204, slime#929: read while it is written again")
class ReusesItsBuffer(ReferencePacker):
    """Packs the first bucket of every round into the same memory."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[int, torch.Tensor] = {}
        self.round = -1

    def buffer_of(self, data: bytes) -> torch.Tensor:
        fresh = super().buffer_of(data)
        if self.round == self.version:
            return fresh
        self.round = self.version
        kept = self.kept.setdefault(len(data), fresh)
        kept.copy_(fresh)
        return kept


@mutant("B8-complete", "double buffering without waiting for the copy")
class FillsLate(ReferencePacker):
    """Hands a bucket out first, and writes its bytes when the next one is asked for."""

    def pack(self, source: object, capacity: int, groups: Iterable[Iterable[str]] = ()) -> Iterator[RefBucket]:
        for bucket in super().pack(source, capacity, groups):
            data = bucket.buffer.clone()
            bucket.buffer.zero_()
            yield bucket
            bucket.buffer.copy_(data)


@mutant("B8-independent")
class HandsTheSourceBack(ReferencePacker):
    """Where both sides are one process, hands out the source's own tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.local: dict[str, torch.Tensor] = {}

    def pairs(self, source: object) -> Iterable[tuple[str, torch.Tensor]]:
        pairs = super().pairs(source)
        if isinstance(source, list):
            self.local = dict(source)
        return pairs

    def unpack(self, buckets: Sequence[RefBucket]) -> Pairs:
        return [(name, self.local.get(name, tensor)) for name, tensor in super().unpack(buckets)]


@mutant("B8-retained", "verl get_named_tensor_buckets: a detached slice escapes its clone")
class RetainsALargeStorage(ReferencePacker):
    """Cuts every buffer out of a megabyte."""

    def buffer_of(self, data: bytes) -> torch.Tensor:
        arena = torch.zeros(1 << 20, dtype=torch.uint8)[: len(data)]
        arena.copy_(super().buffer_of(data))
        return arena


@mutant("B15-rounds", "vllm#51258, slime#1731, vllm#52950")
class KeepsEveryRound(ReferencePacker):
    """Keeps all buckets that it ever made."""

    kept: ClassVar[list[RefBucket]] = []

    def seal(self, bucket: RefBucket) -> RefBucket:
        sealed = super().seal(bucket)
        self.kept.append(sealed)
        return sealed


@mutant("B15-rounds")
class KeepsBytesOfEveryRound(ReferencePacker):
    """Keeps what it packed as byte strings, for a comparison that is never made."""

    kept: ClassVar[list[bytes]] = []

    def content(self, tensor: torch.Tensor) -> bytes:
        data = super().content(tensor)
        self.kept.append(data)
        return data


@mutant("B15-lookahead")
class HoldsStorages(ReferencePacker):
    """Keeps a detached tensor of every source until its round is over."""

    class stream(Stream):
        def add(self, name: str, tensor: torch.Tensor) -> list[RefBucket]:
            self.roots[name] = tensor.detach()  # type: ignore[assignment]
            return super().add(name, tensor)


@mutant("B15-lookahead", "verl#6733: out of memory")
class ListsItsSource(ReferencePacker):
    """Makes a list of the source before it packs the first tensor."""

    def pairs(self, source: object) -> list[tuple[str, torch.Tensor]]:
        return list(super().pairs(source))


@mutant("B15-lookahead")
class HoldsWhatItPacked(ReferencePacker):
    """Refers to every source tensor until its round is over."""

    class stream(Stream):
        def add(self, name: str, tensor: torch.Tensor) -> list[RefBucket]:
            self.roots[name] = tensor  # type: ignore[assignment]
            return super().add(name, tensor)
