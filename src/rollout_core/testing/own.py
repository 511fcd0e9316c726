"""This project's own packers, as packers under test."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator, Sequence
from typing import Any, ClassVar

import torch

from rollout_core.bucketing import (
    Bucket,
    BucketPlan,
    Packer,
    StreamBucket,
    TensorSpec,
    aiter_buckets,
    apack_stream,
    iter_buckets,
    pack_stream,
    plan_buckets,
    specs_of,
    unpack,
    unpack_stream,
)
from rollout_core.bucketing.stream_header import decode_header
from rollout_core.errors import ManifestError
from rollout_core.testing.packers import Pairs, SpecRow


class PlannedPacker:
    """``Packer`` and ``unpack``: both sides have the plan, and one Packer serves all rounds of it."""

    capabilities: ClassVar[set[str]] = {"mappings", "modules", "groups", "views", "end", "integrity", "versions", "oversize=split"}
    manifest_errors = ManifestError

    def __init__(self) -> None:
        self._plan = plan_buckets([], 1)
        self._packer = Packer(self._plan)
        self._round = 0

    def pack(self, source: Any, capacity: int, groups: Iterable[Iterable[str]] = ()) -> Iterator[Bucket]:
        plan = plan_buckets(specs_of(source), capacity, groups=groups)
        if plan != self._plan:
            self._plan, self._packer = plan, Packer(plan)
        self._round += 1
        return self._packer.pack(source, version=self._round)

    def unpack(self, buckets: Sequence[Bucket]) -> Pairs:
        return list(unpack(self._plan, buckets))

    def receive(self, specs: Sequence[SpecRow], capacity: int, buckets: Sequence[Bucket]) -> Pairs:
        return list(unpack(plan_buckets([TensorSpec(*spec) for spec in specs], capacity), buckets))

    def bucket_nbytes(self, bucket: Bucket) -> int:
        return bucket.nbytes

    def slots(self, bucket: Bucket) -> list[tuple[str, int, int]]:
        return [(slot.name, slot.offset, slot.nbytes) for slot in self._plan.buckets[bucket.index].slots]

    def buffer(self, bucket: Bucket) -> torch.Tensor:
        return bucket.buffer

    def manifest(self, named: Pairs, capacity: int) -> bytes:
        return plan_buckets(specs_of(named), capacity).to_bytes()

    def read_manifest(self, data: bytes) -> BucketPlan:
        return BucketPlan.from_bytes(data)


class StreamPacker:
    """``pack_stream`` and ``unpack_stream``: nothing is known ahead, and each bucket carries its layout."""

    capabilities: ClassVar[set[str]] = {
        *("iterators", "mappings", "modules", "groups", "views", "end", "integrity", "versions", "oversize=split")
    }

    def __init__(self) -> None:
        self._round = 0

    def pack(self, source: Any, capacity: int, groups: Iterable[Iterable[str]] = ()) -> Iterator[StreamBucket]:
        self._round += 1
        return pack_stream(source, capacity, groups=groups, version=self._round)

    def apack(self, source: AsyncIterable[tuple[str, torch.Tensor]], capacity: int) -> AsyncIterator[StreamBucket]:
        return apack_stream(source, capacity)

    def unpack(self, buckets: Sequence[StreamBucket]) -> Pairs:
        return list(unpack_stream(buckets))

    def bucket_nbytes(self, bucket: StreamBucket) -> int:
        return bucket.nbytes

    def slots(self, bucket: StreamBucket) -> list[tuple[str, int, int]]:
        _header, layout, _tied = decode_header(bucket.header, bucket.index, 1 << 20)
        return [(slot.name, slot.offset, slot.nbytes) for slot in layout.slots]

    def buffer(self, bucket: StreamBucket) -> torch.Tensor:
        return bucket.buffer


class GroupingPacker:
    """``iter_buckets`` and ``aiter_buckets``: lists of named tensors, each with memory of its own."""

    capabilities: ClassVar[set[str]] = {"iterators", "mappings", "modules", "oversize=own"}

    def pack(self, source: Any, capacity: int) -> Iterator[Pairs]:
        return iter_buckets(source, capacity)

    def apack(self, source: AsyncIterable[tuple[str, torch.Tensor]], capacity: int) -> AsyncIterator[Pairs]:
        return aiter_buckets(source, capacity)

    def unpack(self, buckets: Sequence[Pairs]) -> Pairs:
        return [pair for bucket in buckets for pair in bucket]
