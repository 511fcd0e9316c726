"""Digests by which what a worker has is held against what was sent to it (clause W2)."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Final

import torch
import xxhash

from rollout_core.bucketing import Bucket, BucketPlan
from rollout_core.bucketing.digest import BLOCK_ALGORITHM, Algorithm, default_algorithm, payload_digest
from rollout_core.bucketing.digesting import BlockDigests
from rollout_core.bucketing.placement import Slot
from rollout_core.bucketing.tensors import as_bytes
from rollout_core.workers.shards import WHOLE, Shard

#: Bytes that are digested at once: some are copies, of what is strided or was computed, and are kept until then.
_AT_ONCE: Final = 256 << 20


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


def weight_digests(
    tensors: Iterable[tuple[str, torch.Tensor]], *, values: bool = False, algorithm: str = "xxh3-128"
) -> dict[str, str]:
    """``weight_digest`` of each, by name. On a GPU they are computed by a launch for each 256 MiB, and waited for once."""
    if algorithm != BLOCK_ALGORITHM:
        return {name: weight_digest(tensor, values=values, algorithm=algorithm) for name, tensor in tensors}
    found: BlockDigests[str] = BlockDigests()
    queued = 0
    for name, tensor in tensors:
        tensor = tensor.detach()
        raw = _readable(without_signs(tensor) if values else tensor)
        found.add(name, raw)
        queued += raw.nbytes
        if queued >= _AT_ONCE:
            found.flush()
            queued = 0
    return {name: digest.hex() for name, digest in found.digests().items()}


def _readable(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, if its bytes are those of its values and lie one after the other; else such a copy."""
    is_plain = tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()
    return tensor if is_plain else as_bytes(tensor)


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
        if algorithm not in ("xxh3-128", BLOCK_ALGORITHM):
            raise ValueError(f"algorithm is {algorithm!r}; it is 'xxh3-128' or {BLOCK_ALGORITHM!r}")
        self._plan = plan
        self._values = values
        self._algorithm = algorithm
        self._parts = parts or {}
        self._states: dict[str, Any] = {}  # of split tensors, by xxh3-128
        self._joined: dict[str, torch.Tensor] = {}  # the bytes of split tensors, where parts of them are wanted
        # A launch for each bucket, which is not waited for.
        self._blocks: BlockDigests[tuple[str, Shard]] | None = BlockDigests() if algorithm == BLOCK_ALGORITHM else None
        self._found: dict[tuple[str, Shard], str] = {}

    @property
    def of_parts(self) -> dict[tuple[str, Shard], str]:
        """By name and part, of whole tensors, too: of all tensors that are complete."""
        found = dict(self._found)
        if self._blocks is not None:
            found.update((key, digest.hex()) for key, digest in self._blocks.digests().items())
        tied = self._plan.tied
        return {(one, part): digest for (name, part), digest in found.items() for one in (name, *tied.get(name, ()))}

    @property
    def digests(self) -> dict[str, str]:
        """By name, of all tensors that are complete."""
        return {name: digest for (name, part), digest in self.of_parts.items() if part.is_whole}

    def add(self, bucket: Bucket) -> None:
        """The buckets come in their order. What is done to one's memory on the current stream from then on does not matter."""
        for slot in self._plan.buckets[bucket.index].slots:
            names = (slot.name, *self._plan.tied.get(slot.name, ()))
            parts = {part for name in names for part in self._parts.get(name, ()) if not part.is_whole}
            memory, start = bucket.buffer, slot.offset
            if self._values:
                memory, start = as_bytes(without_signs(memory[slot.offset : slot.end].view(slot.spec.dtype))), 0
            self._add_whole(slot, memory, start)
            if parts:
                self._add_parts(slot, memory[start : start + slot.nbytes], parts)
        if self._blocks is not None:
            self._blocks.flush()

    def _add_whole(self, slot: Slot, memory: torch.Tensor, start: int) -> None:
        """A tensor, or a piece of it, which lies in ``memory`` from byte ``start`` on."""
        if self._blocks is not None:
            self._blocks.add((slot.name, WHOLE), memory, start, slot.nbytes, last=slot.is_tail)
            return
        piece = memory[start : start + slot.nbytes]
        if not slot.is_piece:
            self._found[slot.name, WHOLE] = weight_digest(piece, algorithm=self._algorithm)
        else:
            state = self._states.setdefault(slot.name, xxhash.xxh3_128())
            state.update(piece.cpu().numpy().data)
            if slot.is_tail:
                self._found[slot.name, WHOLE] = str(self._states.pop(slot.name).hexdigest())

    def _add_parts(self, slot: Slot, piece: torch.Tensor, parts: Collection[Shard]) -> None:
        """Parts of the slot's tensor, once it is complete."""
        if slot.is_piece:
            if slot.name not in self._joined:
                self._joined[slot.name] = torch.empty(slot.spec.nbytes, dtype=torch.uint8, device=piece.device)
            self._joined[slot.name][slot.start : slot.start + slot.nbytes].copy_(piece)
            if not slot.is_tail:
                return
            piece = self._joined.pop(slot.name)
        whole = piece.view(slot.spec.dtype).view(slot.spec.shape)
        for part in parts:
            if self._blocks is not None:
                self._blocks.add((slot.name, part), _readable(part.of(whole)))
            else:
                self._found[slot.name, part] = weight_digest(part.of(whole), algorithm=self._algorithm)


def combined_digest(digests: Mapping[str, str]) -> str:
    """32 hexadecimal digits over names and digests, whatever their order; names are told apart by their lengths."""
    state = hashlib.blake2b(digest_size=16)
    for name in sorted(digests):
        raw = name.encode("utf-8", "surrogatepass")
        state.update(len(raw).to_bytes(8, "little") + raw + bytes.fromhex(digests[name]))
    return state.hexdigest()
