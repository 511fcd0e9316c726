"""Which part of a tensor each rank of an engine has, and what that says of an update (clause W9). Pure.

With tensor parallelism no rank has whole tensors: it has rows of one layer, columns of the next, all of a norm. A rank says which
part of each it has, by the tensor's name and place in a checkpoint. What was sent is cut in the same way, so that each rank's part
is held against the same part of what was sent: nothing is gathered, and what differs is known by rank and name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import msgspec
import torch

from rollout_core.bucketing import BucketPlan
from rollout_core.bucketing.tensors import as_bytes, same_bits_copy
from rollout_core.errors import WorkerError
from rollout_core.workers.names import EMBEDDING, HEAD, canonical


class Shard(msgspec.Struct, frozen=True):
    """A part of a tensor: from its dimension ``dim`` the ``ranges`` (from, to), one after the other; without ranges all of it. An
    empty range is a part, too: of a rank for which nothing is left."""

    dim: int = 0
    ranges: tuple[tuple[int, int], ...] = ()

    @property
    def is_whole(self) -> bool:
        return not self.ranges

    @property
    def size(self) -> int:
        """Of ``dim``, unless it is whole."""
        return sum(end - start for start, end in self.ranges)

    def of(self, whole: torch.Tensor) -> torch.Tensor:
        """The part of this tensor: a view, unless it has several ranges."""
        parts = [whole.narrow(self.dim, start, end - start) for start, end in self.ranges]
        return whole if not parts else parts[0] if len(parts) == 1 else torch.cat(parts, self.dim)


WHOLE = Shard()


def gap_in(shape: Sequence[int], shards: Iterable[Shard]) -> str | None:
    """What of a tensor of this shape none of these has, in words; None if together they have all of it."""
    shards = list(shards)
    if any(shard.is_whole for shard in shards):
        return None
    if not shards:
        return "any of it"
    dim = shards[0].dim
    if any(shard.dim != dim for shard in shards):
        return "it cut along one dimension"
    end = 0
    for start, stop in sorted(part for shard in shards for part in shard.ranges):
        if start > end:
            return f"{end} to {start} of its dimension {dim}"
        end = max(end, stop)
    return None if end == shape[dim] else f"{end} to {shape[dim]} of its dimension {dim}"


def joined(name: str, shape: Sequence[int], parts: Mapping[int, tuple[Shard, torch.Tensor]]) -> torch.Tensor:
    """The whole tensor, on the CPU, of the parts that ranks, by number, have of it. ``WorkerError`` if two ranks have different
    values of what both have, or if no rank has some of it."""
    gap = gap_in(shape, (shard for shard, _ in parts.values()))
    if gap is not None:
        raise WorkerError(f"no rank has {gap} of tensor {name!r}" if parts else f"the worker has no tensor {name!r}")
    whole = torch.empty(tuple(shape), dtype=next(iter(parts.values()))[1].dtype)
    for rank in sorted(parts, reverse=True):  # what several have is the first one's
        shard, part = parts[rank]
        done = 0
        for start, end in shard.ranges:
            same_bits_copy(whole.narrow(shard.dim, start, end - start), part.narrow(shard.dim, done, end - start))
            done += end - start
        if shard.is_whole:
            same_bits_copy(whole, part.view(whole.shape))
    for rank, (shard, part) in parts.items():
        if not torch.equal(as_bytes(shard.of(whole)), as_bytes(part)):
            raise WorkerError(f"rank {rank} has other values of tensor {name!r} than a rank before it")
    return whole


class Expected:
    """What each rank has to have after an update of this plan. ``layout``: by rank, which part it has of the tensors that it has,
    by the names of a checkpoint.

    ``WorkerError`` if a part of a tensor would be on no rank, so that nothing could be said of it.
    """

    def __init__(self, layout: Sequence[Mapping[str, Shard]], plan: BucketPlan) -> None:
        self._layout = layout
        self._sources: dict[str, str] = {}  # the name in the update of what a checkpoint calls so
        #: By the names of the update, the parts of which digests are wanted.
        self.parts: dict[str, set[Shard]] = {}
        sent = {canonical(spec.name): spec for spec in plan.specs}
        for name in dict.fromkeys(name for shards in layout for name in shards):
            spec = sent.get(canonical(name))
            if spec is None and name == HEAD:
                spec = sent.get(EMBEDDING)  # tied, or it would have had to be sent
            if spec is None:
                continue
            shards = [one[name] for one in layout if name in one]
            self._sources[name] = spec.name
            self.parts.setdefault(spec.name, set()).update(shards)
        for spec in plan.specs:
            gap = gap_in(spec.shape, self.parts.get(spec.name, ()))
            if gap is not None:
                raise WorkerError(
                    f"no rank says where it has {gap} of tensor {spec.name!r}, which could not be read back: pass readback=False"
                )

    def check(self, sent: Mapping[tuple[str, Shard], str], found: Sequence[Mapping[str, str]]) -> dict[str, str]:
        """The digests of whole tensors, by the names of a checkpoint, once each rank has each of its parts as it was ``sent``.
        ``WorkerError`` naming the first tensor that some rank has otherwise, and that rank."""
        wrong = []
        for rank, shards in enumerate(self._layout):
            for name, shard in shards.items():
                source = self._sources.get(name)
                if source is not None and found[rank].get(name) != sent[source, shard]:
                    wrong.append((rank, name, source, shard))
        if wrong:
            rank, name, source, shard = wrong[0]
            ranks = sorted({one[0] for one in wrong})
            raise WorkerError(
                f"{len(wrong)} parts of tensors read back from the worker are not what was sent, on ranks {ranks} of "
                f"{len(self._layout)}, first {name!r} on rank {rank}: sent {sent[source, shard]}, found {found[rank].get(name)}; "
                "the worker's weights are not the trainer's"
            )
        return {name: sent[source, WHOLE] for name, source in self._sources.items()}
