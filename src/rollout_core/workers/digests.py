"""Digests by which what a worker has is held against what was sent to it (clause W2)."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from typing import Any

import torch
import xxhash

from rollout_core.bucketing import Bucket, BucketPlan
from rollout_core.bucketing.digest import Algorithm, default_algorithm, payload_digest
from rollout_core.bucketing.placement import Slot
from rollout_core.bucketing.tensors import as_bytes
from rollout_core.workers.shards import WHOLE, Shard


def algorithm_on(device: str) -> Algorithm:
    """By which weights on this device are digested, wherever the same bytes are held against them: one that runs there."""
    return default_algorithm(torch.device(device))


def weight_digest(tensor: torch.Tensor, *, values: bool = False, algorithm: str = "xxh3-128") -> str:
    """32 hexadecimal digits of a tensor's bytes; with ``values`` of its values, which -0.0 and 0.0 have in common. By xxh3-128 they
    are of the bytes alone, as any xxHash has them; another algorithm is ``payload_digest``'s, with an empty context."""
    tensor = tensor.detach()
    raw = as_bytes(without_signs(tensor) if values else tensor)
    if algorithm == "xxh3-128":
        return xxhash.xxh3_128_hexdigest(raw.cpu().numpy().data)
    return payload_digest(raw, b"", algorithm).hex()


def without_signs(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with 0.0 for -0.0."""
    return tensor + 0.0 if tensor.is_floating_point() and tensor.dtype.itemsize > 1 else tensor


class SentDigests:
    """The digest of each tensor, taken from the buckets as they are sent, where they are; see ``weight_digest``. ``parts``: by
    name, the parts of tensors that are digested as well."""

    def __init__(
        self,
        plan: BucketPlan,
        *,
        values: bool = False,
        algorithm: str = "xxh3-128",
        parts: Mapping[str, Collection[Shard]] | None = None,
    ) -> None:
        self._plan = plan
        self._values = values
        self._algorithm = algorithm
        self._parts = parts or {}
        self._states: dict[str, Any] = {}  # of split tensors, by xxh3-128
        self._joined: dict[str, torch.Tensor] = {}  # the bytes of split tensors, where they are wanted whole
        self.digests: dict[str, str] = {}
        self.of_parts: dict[tuple[str, Shard], str] = {}  # whole tensors among them

    def add(self, bucket: Bucket) -> None:
        for slot in self._plan.buckets[bucket.index].slots:
            names = (slot.name, *self._plan.tied.get(slot.name, ()))
            shards = {shard for name in names for shard in self._parts.get(name, ()) if not shard.is_whole}
            found = self._digests(slot, bucket.buffer[slot.offset : slot.end], shards)
            for name in names if found else ():
                self.digests[name] = found[WHOLE]
                self.of_parts.update(((name, shard), digest) for shard, digest in found.items())

    def _digests(self, slot: Slot, piece: torch.Tensor, shards: Collection[Shard]) -> dict[Shard, str]:
        """Of the slot's tensor and of parts of it, once it is complete; else none."""
        if self._values:
            piece = as_bytes(without_signs(piece.view(slot.spec.dtype)))
        if slot.is_piece and self._algorithm == "xxh3-128" and not shards:
            state = self._states.setdefault(slot.name, xxhash.xxh3_128())
            state.update(piece.cpu().numpy().data)
            return {WHOLE: str(self._states.pop(slot.name).hexdigest())} if slot.is_tail else {}
        if slot.is_piece:
            if slot.name not in self._joined:
                self._joined[slot.name] = torch.empty(slot.spec.nbytes, dtype=torch.uint8, device=piece.device)
            self._joined[slot.name][slot.start : slot.start + slot.nbytes].copy_(piece)
            if not slot.is_tail:
                return {}
            piece = self._joined.pop(slot.name)
        whole = piece.view(slot.spec.dtype).view(slot.spec.shape) if shards else piece
        parts = {shard: weight_digest(shard.of(whole), algorithm=self._algorithm) for shard in shards}
        return {WHOLE: weight_digest(piece, algorithm=self._algorithm), **parts}


def combined_digest(digests: Mapping[str, str]) -> str:
    """32 hexadecimal digits over names and digests, whatever their order; names are told apart by their lengths."""
    state = hashlib.blake2b(digest_size=16)
    for name in sorted(digests):
        raw = name.encode("utf-8", "surrogatepass")
        state.update(len(raw).to_bytes(8, "little") + raw + bytes.fromhex(digests[name]))
    return state.hexdigest()
