"""unpack and Unpacker: from the buckets of a plan back to named tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TypeAlias

import torch

from rollout_core.bucketing.bucket import Bucket, check_sealed, check_version, verify
from rollout_core.bucketing.placement import BucketLayout, Slot
from rollout_core.bucketing.plan import BucketPlan
from rollout_core.bucketing.recipes import Recipe, Views
from rollout_core.bucketing.scatter import Scatter
from rollout_core.bucketing.sources import Pair
from rollout_core.bucketing.specs import TensorSpec
from rollout_core.bucketing.tensors import own_copy, view_key
from rollout_core.errors import IncompleteStreamError, IntegrityError, PlanMismatchError

#: Where a split tensor is joined, by its spec: its bytes as a 1-d contiguous uint8 tensor, aligned for its dtype, on any device;
#: None for new memory. Asked before the first piece, once that is verified.
JoinMemory: TypeAlias = Callable[[TensorSpec], torch.Tensor | None]
#: Called with each verified bucket's layout and buffer: whether it has taken all of it, so that nothing of it is handed out. It
#: says the same of every bucket of a round.
WriteBucket: TypeAlias = Callable[[BucketLayout, torch.Tensor], bool]


def unpack(plan: BucketPlan, buckets: Iterable[Bucket], *, verify: bool = True, copy: bool = False) -> Iterator[Pair]:
    """The (name, tensor) pairs of one round of buckets, in ``plan.arrival`` order. Arguments and errors: see ``Unpacker``."""
    unpacker = Unpacker(plan, verify=verify, copy=copy)
    for bucket in buckets:
        yield from unpacker.feed(bucket)
    unpacker.close()


class Unpacker:
    """Turns the buckets of a plan, fed one by one and in order, into named tensors.

    Tensors are views of their bucket's buffer and stay valid as long as its content does; a split tensor is joined in memory of
    its own. ``copy=True`` gives every tensor memory of its own. ``verify=True`` checks each bucket's digest before anything of it
    is handed out. ``version``: accept this round of weights only; None accepts any that is newer than the last one. ``memory``:
    where split tensors are joined, such as the parameter that they are for: see ``JoinMemory``. ``write``: what takes buckets as
    they are, before any tensor is made of them: see ``WriteBucket``.

    ``into``: tensors by name that each bucket is written into instead, once it is verified, on a GPU in one launch; ``feed`` hands
    them out then. They are contiguous, of the plan's dtypes and shapes; tied names may be left out, or have one tensor, too.
    ``reuse=True`` keeps the views of each bucket for the rounds that bring it in the same memory, and that memory with it: for a
    receiver whose buffers stay where they are.
    """

    def __init__(
        self,
        plan: BucketPlan,
        *,
        verify: bool = True,
        copy: bool = False,
        version: int | None = None,
        memory: JoinMemory | None = None,
        write: WriteBucket | None = None,
        into: Mapping[str, torch.Tensor] | None = None,
        reuse: bool = False,
    ) -> None:
        if into is not None and (copy or reuse or memory is not None or write is not None):
            raise ValueError("into= takes everything out of the buckets: copy, reuse, memory and write are of no use then")
        self.plan = plan
        self._scatter = None if into is None else Scatter(plan, into)
        if into is not None:
            _check_ties(plan, into)
        self._kept: dict[int, tuple[tuple[int, torch.device], list[Pair]]] | None = {} if reuse and not copy else None
        self._memory = memory
        self._write = write
        self._verify = verify
        self._copy = copy
        self._last_version = -1
        self._written: dict[int, list[Pair]] = {}  # by bucket, of ``into``
        self.restart(version=version)

    def restart(self, *, version: int | None = None) -> None:
        """Begin a round, the next, or the same again if it was not completed: what a round in progress has is dropped."""
        self._next = 0
        self._version = None if version is None else check_version(version)
        self._joins: dict[str, torch.Tensor] = {}

    @property
    def version(self) -> int | None:
        """The round of weights under way or done; None before its first bucket, unless it was asked for."""
        return self._version

    def feed(self, bucket: Bucket) -> list[Pair]:
        """The tensors that this bucket completes, in arrival order.

        Raises ``PlanMismatchError`` (another plan's bucket), ``IncompleteStreamError`` (fed twice, out of order, or after the end)
        or ``IntegrityError`` (damaged, or of another version). After an error nothing of the bucket has been used.
        """
        layout = self._accept(bucket)
        if self._verify:
            verify(bucket)
        is_written = self._write is not None and self._write(layout, bucket.buffer)
        pairs = [] if is_written else self._hand_out(layout, bucket.buffer)
        self._version = bucket.version
        self._next += 1
        if self._next == len(self.plan.buckets):
            self._last_version = bucket.version
        if self._joins:
            drop_joined(self._joins, layout)
        return pairs

    def close(self) -> None:
        """Raise ``IncompleteStreamError`` if a bucket of this round is missing."""
        if self._next < len(self.plan.buckets):
            missing = self._missing()
            raise IncompleteStreamError(
                f"the stream ended after {self._next} of {len(self.plan.buckets)} buckets; missing {len(missing)} tensors: "
                + ", ".join(repr(name) for name in missing[:3])
                + (", ..." if len(missing) > 3 else "")
            )

    def _missing(self) -> list[str]:
        rest = self.plan.buckets[self._next :]
        return [slot.name for layout in rest for slot in layout.slots if slot.is_tail]

    def _accept(self, bucket: Bucket) -> BucketLayout:
        """The bucket's layout, if it is the one whose turn it is."""
        if bucket.plan_digest != self.plan.digest:
            raise PlanMismatchError(
                f"bucket {bucket.index} is of plan {bytes(bucket.plan_digest).hex()}, and this side has plan "
                f"{self.plan.digest.hex()}; exchange manifests and call require_same to see the first difference"
            )
        check_sealed(bucket)
        count = len(self.plan.buckets)
        if self._next == count:
            raise IncompleteStreamError(
                f"bucket {bucket.index} came after the end: all {count} buckets of this round were fed; call restart() for the next"
            )
        if bucket.index != self._next:
            when = "was fed already" if bucket.index < self._next else "is out of order"
            raise IncompleteStreamError(f"bucket {bucket.index} {when}; the next one is bucket {self._next} of {count}")
        if self._version is not None and bucket.version != self._version:
            raise IntegrityError(f"bucket {bucket.index} is of version {bucket.version}, and this round is version {self._version}")
        if bucket.version <= self._last_version:
            raise IntegrityError(
                f"bucket {bucket.index} is of version {bucket.version}, which is not newer than {self._last_version}: a replay"
            )
        layout = self.plan.buckets[bucket.index]
        check_payload(bucket, layout.nbytes)
        return layout

    def _hand_out(self, layout: BucketLayout, buffer: torch.Tensor) -> list[Pair]:
        if self._scatter is not None:
            self._scatter.write(layout, buffer)
            written = self._written.get(layout.index)
            if written is None:  # the tensors are the same in every round
                steps = self.plan.recipes[layout.index].steps
                whole = [(name, self._scatter.targets[name]) for slot, name, _, _ in steps if slot.is_tail]
                written = [pair for name, tensor in whole for pair in _named(name, tensor, self.plan.tied)]
                self._written[layout.index] = written
            return list(written)
        if self._kept is None:
            return self._views(layout, buffer)
        key = (buffer.data_ptr(), buffer.device)
        kept = self._kept.get(layout.index)
        if kept is not None and kept[0] == key:  # what is kept keeps the memory: no other can have come to lie there
            return list(kept[1])
        pairs = self._views(layout, buffer)
        if not any(slot.is_piece for slot in layout.slots):
            self._kept[layout.index] = (key, list(pairs))
        return pairs

    def _views(self, layout: BucketLayout, buffer: torch.Tensor) -> list[Pair]:
        recipe = self.plan.recipes[layout.index]
        return hand_out(recipe, buffer, self.plan.tied, joins=self._joins, memory=self._memory, copy=self._copy)


def _check_ties(plan: BucketPlan, into: Mapping[str, torch.Tensor]) -> None:
    """Raise ``PlanMismatchError`` for a tied name that has a tensor of its own, which nothing would be written into."""
    for spec in plan.specs:
        if spec.alias_of and spec.name in into and view_key(into[spec.name].detach()) != view_key(into[spec.alias_of].detach()):
            raise PlanMismatchError(
                f"the plan ties {spec.name!r} to {spec.alias_of!r}, and to write into they are two tensors, of which the first "
                "would stay as it is; leave it out, or plan with specs_of(..., aliases=False)"
            )


def check_payload(bucket: Bucket, nbytes: int) -> None:
    """Raise ``IntegrityError`` unless the bucket's buffer is ``nbytes`` contiguous bytes."""
    buffer = bucket.buffer
    if buffer.dtype is not torch.uint8 or buffer.shape != (nbytes,) or not buffer.is_contiguous():
        raise IntegrityError(
            f"bucket {bucket.index} has a buffer of {buffer.dtype} with shape {list(buffer.shape)}; "
            f"its layout is {nbytes} contiguous bytes"
        )


def hand_out(
    recipe: Recipe,
    buffer: torch.Tensor,
    tied: Mapping[str, Sequence[str]],
    *,
    joins: dict[str, torch.Tensor],
    memory: JoinMemory | None,
    copy: bool,
) -> list[Pair]:
    """The pairs that a bucket completes, each tensor under its own name and those ``tied`` to it. ``joins``: the split tensors that
    are not whole yet."""
    views = Views(buffer)
    if recipe.wholes is not None and not copy:
        return [pair for dtype, wholes in recipe.wholes for pair in views.pairs(dtype, wholes)]
    pairs: list[Pair] = []
    for slot, name, shape, strides in recipe.steps:
        if strides is None:
            joined = join_piece(joins, slot, buffer, memory)
            if joined is None:
                continue
            tensor = joined
        else:
            tensor = views.tensor(slot, shape, strides)
            if copy:
                tensor = own_copy(tensor)
        pairs += _named(name, tensor, tied)
    return pairs


def _named(name: str, tensor: torch.Tensor, tied: Mapping[str, Sequence[str]]) -> list[Pair]:
    """The tensor under its name and those that are tied to it."""
    return [(each, tensor) for each in (name, *tied.get(name, ()))]


def join_piece(
    joins: dict[str, torch.Tensor], slot: Slot, buffer: torch.Tensor, memory: JoinMemory | None = None
) -> torch.Tensor | None:
    """Copy a piece of a split tensor into its place, see ``JoinMemory``; the tensor, once whole."""
    if slot.start == 0:
        given = None if memory is None else memory(slot.spec)
        if given is None:
            with torch.inference_mode(False):  # later pieces may come outside of it
                given = torch.empty(slot.spec.nbytes, dtype=torch.uint8, device=buffer.device)
        joins[slot.name] = given
    joined = joins[slot.name]
    joined[slot.start : slot.start + slot.nbytes].copy_(buffer[slot.offset : slot.end])
    return joined.view(slot.spec.dtype).view(slot.spec.shape) if slot.is_tail else None


def drop_joined(joins: dict[str, torch.Tensor], layout: BucketLayout) -> None:
    """Forget the tensors that this bucket completed, once all of it was handed out: until then it may be fed again."""
    for slot in layout.slots:
        if slot.is_piece and slot.is_tail:
            del joins[slot.name]
