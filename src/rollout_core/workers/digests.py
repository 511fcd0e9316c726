"""Digests by which what a worker has is held against what was sent to it (clause W2)."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
import xxhash

from rollout_core.bucketing import Bucket, BucketPlan
from rollout_core.bucketing.tensors import as_bytes


def weight_digest(tensor: torch.Tensor, *, values: bool = False) -> str:
    """Hexadecimal xxh3-128 of a tensor's bytes; with ``values`` of its values, which -0.0 and 0.0 have in common."""
    tensor = tensor.detach()
    return xxhash.xxh3_128_hexdigest(as_bytes(without_signs(tensor) if values else tensor).cpu().numpy().data)


def without_signs(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with 0.0 for -0.0."""
    return tensor + 0.0 if tensor.is_floating_point() and tensor.dtype.itemsize > 1 else tensor


class SentDigests:
    """The digest of each tensor, taken from the buckets as they are sent; see ``weight_digest``."""

    def __init__(self, plan: BucketPlan, *, values: bool = False) -> None:
        self._plan = plan
        self._values = values
        self._states: dict[str, Any] = {}
        self.digests: dict[str, str] = {}

    def add(self, bucket: Bucket) -> None:
        for slot in self._plan.buckets[bucket.index].slots:
            state = self._states.setdefault(slot.name, xxhash.xxh3_128())
            piece = bucket.buffer[slot.offset : slot.end]
            if self._values:
                piece = as_bytes(without_signs(piece.view(slot.spec.dtype)))
            state.update(piece.cpu().numpy().data)
            if slot.is_tail:
                digest = self._states.pop(slot.name).hexdigest()
                for name in (slot.name, *self._plan.tied.get(slot.name, ())):
                    self.digests[name] = digest


def combined_digest(digests: Mapping[str, str]) -> str:
    """32 hexadecimal digits over names and digests, whatever their order; names are told apart by their lengths."""
    state = hashlib.blake2b(digest_size=16)
    for name in sorted(digests):
        raw = name.encode("utf-8", "surrogatepass")
        state.update(len(raw).to_bytes(8, "little") + raw + bytes.fromhex(digests[name]))
    return state.hexdigest()
