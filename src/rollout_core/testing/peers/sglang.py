"""SGLang's FlattenedTensorBucket, as its receiver uses it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from rollout_core.testing.peers.common import Named, Slots, cut_greedily
from rollout_core.testing.peers.loading import PeerPackage

PACKAGE = PeerPackage("sglang", "0.5.23", "sglang")


@dataclass
class FlattenedPayload:
    """What travels: the two attributes of a sender's bucket that its users send."""

    flattened_tensor: torch.Tensor
    metadata: list[Any]


class FlattenedTensorBuckets:
    """``FlattenedTensorBucket`` of sglang/srt/weight_sync/tensor_bucket.py.

    The class makes one bucket of one list and leaves the grouping to its caller: buckets are cut greedily in stream order, as
    slime and miles do, and a tensor over the capacity gets a bucket of its own. The receiving side builds a new bucket from the
    flattened tensor and the metadata and calls ``reconstruct_tensors``, as SGLang's weight updater does. The peer makes no list
    of nothing: a bucket without tensors is its ValueError, and its users send none.
    """

    capabilities = frozenset({"oversize=own"})

    def __init__(self) -> None:
        module = PACKAGE.load("sglang.srt.weight_sync.tensor_bucket")
        self._bucket = module.FlattenedTensorBucket
        self._metadata = module.FlattenedTensorMetadata

    def pack(self, named_tensors: Iterable[Named], capacity: int) -> list[FlattenedPayload]:
        buckets = [self._bucket(named_tensors=group) for group in cut_greedily(named_tensors, capacity)]
        return [FlattenedPayload(bucket.get_flattened_tensor(), bucket.get_metadata()) for bucket in buckets]

    def unpack(self, buckets: Iterable[FlattenedPayload]) -> list[Named]:
        received: list[Named] = []
        for payload in buckets:
            # SGLang's receiver copies each metadata object field by field into its own class before it uses it.
            metadata = [
                self._metadata(
                    name=meta.name,
                    shape=meta.shape,
                    dtype=meta.dtype,
                    start_idx=meta.start_idx,
                    end_idx=meta.end_idx,
                    numel=meta.numel,
                )
                for meta in payload.metadata
            ]
            bucket = self._bucket(flattened_tensor=payload.flattened_tensor, metadata=metadata)
            received += bucket.reconstruct_tensors()
        return received

    def bucket_nbytes(self, bucket: FlattenedPayload) -> int:
        return bucket.flattened_tensor.nbytes

    def slots(self, bucket: FlattenedPayload) -> Slots:
        return [(meta.name, meta.start_idx, meta.end_idx - meta.start_idx) for meta in bucket.metadata]

    def buffer(self, bucket: FlattenedPayload) -> torch.Tensor:
        return bucket.flattened_tensor
