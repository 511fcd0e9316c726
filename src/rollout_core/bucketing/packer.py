"""pack and Packer: from named tensors to the buckets of a plan."""

from __future__ import annotations

import weakref
from bisect import bisect_left
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterator, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, TypeAlias

import torch

from rollout_core.bucketing.bucket import Bucket, check_version, seal
from rollout_core.bucketing.buffers import Allocate, BufferPool, check_buffer
from rollout_core.bucketing.copying import Run, conform, runs_of, write_run, write_slot, zero_padding
from rollout_core.bucketing.digest import BLOCK_ALGORITHM, DigestChoice, Lanes, check_choice, chosen_algorithm
from rollout_core.bucketing.placement import BucketLayout, Slot
from rollout_core.bucketing.plan import BucketPlan
from rollout_core.bucketing.sources import AnySource, Pair, Source, Step, adrive, as_mapping, drive, in_loop, named_pairs
from rollout_core.bucketing.specs import TensorSpec
from rollout_core.bucketing.tensors import as_bytes, bytes_digest, check_describable, own_copy, view_key
from rollout_core.errors import PlanMismatchError

if TYPE_CHECKING:
    from rollout_core.bucketing.cuda.packing import Filling

NewBuffer = Callable[[int, torch.device], torch.Tensor]
#: How a kernel fills a bucket on a device, and whether it digests it; None if none does.
FillingFor: TypeAlias = "Callable[[BucketLayout, torch.device], tuple[Filling, bool] | None]"


def pack(
    plan: BucketPlan, source: Source, *, version: int = 0, digest: DigestChoice = "auto", allocate: Allocate | None = None
) -> Iterator[Bucket]:
    """The buckets of ``plan`` filled from ``source``, one after the other.

    A source that is an iterator gives its tensors in the plan's order, and each is copied before the next is asked for; mappings
    and modules are read by name. The tensors of a dict, list or module are taken a bucket at a time, so they must not be one piece
    of memory that changes. ``version`` (0 to 2**63 - 1) is the round of weights that the buckets are sealed with.
    ``digest`` is an algorithm, ``"auto"`` by device, or None. ``allocate`` gives the buffers, for example in shared memory.

    Raises ``PlanMismatchError`` (the source's names, dtypes or shapes are not the plan's, or tied tensors no longer are),
    ``SourceError`` (a tensor has no plain bytes), or whatever the source raises. No bucket with a gap is ever yielded.
    """
    return Packer(plan, digest=digest, allocate=allocate).pack(source, version=version)


def apack(
    plan: BucketPlan, source: AnySource, *, version: int = 0, digest: DigestChoice = "auto", allocate: Allocate | None = None
) -> AsyncIterator[Bucket]:
    """``pack`` for sync and async sources."""
    return Packer(plan, digest=digest, allocate=allocate).apack(source, version=version)


class Packer:
    """``pack`` for many rounds of one plan: buffers and everything derived from the plan are kept.

    A bucket's CPU buffer is used again once nothing refers to it any more, so drop each bucket when it is sent. Nothing of a source
    is kept between rounds but addresses. Rounds are numbered from 1 unless ``version`` is given. One Packer serves one thread at a
    time.

    A bucket on a GPU is filled in one launch on the current stream, its digest ``block-multilinear-128`` computed in the same pass,
    where the source is a module, dict or list and Triton is there. Tensors that are not contiguous, or elsewhere, are copied by
    torch before; an iterator's tensors are copied one by one, each before the next is asked for.

    ``executor`` runs the copies of neighbouring like tensors as jobs. torch shares one large copy among its threads but not ten
    thousand small ones; a ``ThreadPoolExecutor(2, initializer=torch.set_num_threads, initargs=(1,))`` does.
    """

    def __init__(
        self,
        plan: BucketPlan,
        *,
        digest: DigestChoice = "auto",
        allocate: Allocate | None = None,
        executor: Executor | None = None,
    ) -> None:
        check_choice(digest)
        self.plan = plan
        self._digest = digest
        self._allocate = allocate
        self._executor = executor
        self._pool = BufferPool()
        self._largest = max((layout.nbytes for layout in plan.buckets if layout.nbytes <= plan.capacity), default=0)
        self._work = _work_of(plan)
        self._fillings: dict[tuple[int, torch.device], Filling] = {}
        self._names = [spec.name for spec in plan.specs]
        self._planned = frozenset(self._names)
        self._tied_places = [i for i, spec in enumerate(plan.specs) if spec.alias_of or spec.name in plan.tied]
        self._round = 0

    def pack(self, source: Source, *, version: int | None = None) -> Iterator[Bucket]:
        """One round: see the function ``pack``."""
        version = self._next_version(version)
        mapping = as_mapping(source)
        if mapping is not None:
            tensors = self._by_name(mapping)
            if isinstance(mapping, dict):
                return self._at_once(tensors, version)
            # Any other mapping may make each tensor when asked for it, and in the same memory.
            return drive(self._one_by_one(version), zip(self._names, tensors, strict=True))
        if isinstance(source, list | tuple):
            return self._at_once(self._in_order(list(named_pairs(source))), version)
        return drive(self._one_by_one(version), named_pairs(source))

    def apack(self, source: AnySource, *, version: int | None = None) -> AsyncIterator[Bucket]:
        """One round: see the function ``apack``."""
        if not isinstance(source, AsyncIterable):
            return in_loop(self.pack(source, version=version))
        return adrive(self._one_by_one(self._next_version(version)), source)

    def _next_version(self, version: int | None) -> int:
        self._round = check_version(self._round + 1 if version is None else version)
        return self._round

    def _by_name(self, mapping: Mapping[str, torch.Tensor]) -> Iterator[torch.Tensor]:
        keys = set(mapping)  # not "in mapping": a lazy mapping may load the tensor to answer
        if keys != self._planned:
            missing = [name for name in self._names if name not in keys]
            if missing:
                raise PlanMismatchError(f"the source has no tensor {missing[0]!r}, and the plan has ({len(missing)} missing)")
            extra = next(name for name in mapping if name not in self._planned)
            raise PlanMismatchError(f"the source has a tensor {extra!r} that the plan has not; plan again with specs_of")
        return map(mapping.__getitem__, self._names)

    def _in_order(self, pairs: list[Pair]) -> Iterator[torch.Tensor]:
        if self._names:
            self._expect(pairs[: len(self._names)], 0)
        if len(pairs) < len(self._names):
            self._expect([], len(pairs))
        self._expect_end(pairs[len(self._names) :])
        return iter([tensor for _, tensor in pairs])

    def _at_once(self, tensors: Iterator[torch.Tensor], version: int) -> Iterator[Bucket]:
        """Fill bucket after bucket from a source whose tensors all live side by side, so that those of a bucket may be taken at
        once. ``tensors`` come in the plan's order."""
        ties = _Ties(self._tied_places, alive=True)
        held: dict[str, torch.Tensor] = {}  # taken from the source, and not yet (or not wholly) copied
        place = 0
        for work in self._work:
            taken = list(islice(tensors, work.until - place))
            for at in ties.places(place, work.until):
                ties.see(self.plan.specs[at], taken[at - place])
            target = _Target(work, self._new_buffer)
            if work.in_order:
                target.copy_in_order(taken, self._executor, self._filling)
            else:
                specs = self.plan.specs[place : work.until]
                held.update((spec.name, t) for spec, t in zip(specs, taken, strict=True) if spec.alias_of is None)
                target.copy_by_name(held, self._filling)
            place = work.until
            del taken
            yield self._seal(target, work.layout.index, version)

    def _one_by_one(self, version: int) -> Step[Bucket]:
        """Fill bucket after bucket, copying each tensor before the next is asked for: the source may use one piece of memory for
        all of them."""
        ties = _Ties(self._tied_places, alive=False)
        held: dict[str, torch.Tensor] = {}
        place = 0
        for work in self._work:
            target = _Target(work, self._new_buffer)
            target.copy_held(held)
            while place < work.until:
                items = (yield 1) or []
                self._expect(items, place)
                name, held[name] = items.pop()
                if ties.places(place, place + 1):
                    ties.see(self.plan.specs[place], held[name])
                target.take_one(name, held, self.plan.specs[place])
                place += 1
            if work is self._work[-1]:
                self._expect_end((yield 1))
            yield self._seal(target, work.layout.index, version)
        if not self._work:
            self._expect_end((yield 1))

    def _expect(self, items: list[Pair], place: int) -> None:
        """Raise ``PlanMismatchError`` unless these are the plan's next tensors."""
        names = [name for name, _ in items]
        if not names:
            raise PlanMismatchError(
                f"the source ended after {place} of {len(self._names)} tensors; the plan's next is {self._names[place]!r}"
            )
        if names != self._names[place : place + len(names)]:
            at = next(i for i, name in enumerate(names) if name != self._names[place + i])
            raise PlanMismatchError(
                f"tensor {place + at} of the source is {names[at]!r}, and of the plan {self._names[place + at]!r}"
            )

    def _expect_end(self, items: list[Pair] | None) -> None:
        if items:
            raise PlanMismatchError(
                f"the source goes on with {items[0][0]!r} after the plan's {len(self._names)} tensors; plan again with specs_of"
            )

    def _seal(self, target: _Target, index: int, version: int) -> Bucket:
        buffer = target.close()
        return seal(buffer, self._digest, index=index, plan_digest=self.plan.digest, version=version, lanes=target.lanes)

    def _filling(self, layout: BucketLayout, device: torch.device) -> tuple[Filling, bool] | None:
        """How a kernel fills this bucket, and whether it digests it; None if it is not on a GPU, or no kernel runs there."""
        if device.type != "cuda":
            return None
        filling = self._fillings.get((layout.index, device))
        if filling is None:
            from rollout_core.bucketing.cuda import launching, packing

            if not launching.usable(device):
                return None
            filling = self._fillings[layout.index, device] = packing.Filling(layout, device)
        return filling, chosen_algorithm(self._digest, device) == BLOCK_ALGORITHM

    def _new_buffer(self, nbytes: int, device: torch.device) -> torch.Tensor:
        if self._allocate is not None:
            return check_buffer(self._allocate(nbytes), nbytes)
        return self._pool.take(nbytes, device, room=self._largest)


@dataclass(frozen=True, slots=True)
class _Work:
    """What one bucket asks for: the source's tensors up to ``until``.

    ``in_order``: the bucket's slots are just those tensors, whole and in the source's order; ``runs`` are theirs.
    """

    layout: BucketLayout
    gaps: tuple[tuple[int, int], ...]
    until: int
    runs: tuple[Run, ...]
    in_order: bool


def _work_of(plan: BucketPlan) -> tuple[_Work, ...]:
    places = {spec.name: place for place, spec in enumerate(plan.specs)}
    work, until = [], 0
    for layout in plan.buckets:
        start = until
        until = max(until, *(places[slot.name] + 1 for slot in layout.slots))
        if layout is plan.buckets[-1]:
            until = len(plan.specs)
        in_order = [places[slot.name] for slot in layout.slots] == list(range(start, until))
        in_order = in_order and not any(slot.is_piece for slot in layout.slots)
        runs = tuple(runs_of(layout)) if in_order else ()
        work.append(_Work(layout, tuple(layout.gaps()), until, runs, in_order))
    return tuple(work)


class _Target:
    """One bucket being filled. Its buffer is made when the first tensor says on which device."""

    def __init__(self, work: _Work, new_buffer: NewBuffer) -> None:
        self._work = work
        self._new_buffer = new_buffer
        self._buffer: torch.Tensor | None = None
        self._filled = False  # by a kernel, padding included
        self._slots: dict[str, Slot] = {}
        #: Of the digest, if a kernel computed them.
        self.lanes: Lanes | None = None

    def copy_in_order(self, tensors: list[torch.Tensor], executor: Executor | None, filling: FillingFor) -> None:
        """Copy a bucket whose slots are just these tensors, at once on a GPU, elsewhere runs of like ones at once."""
        slots = self._work.layout.slots
        if self._fill(slots[0], tensors, filling, lambda slot, tensor: self._copy(slot, {slot.name: tensor})):
            return
        start = 0
        for run in self._work.runs:
            part = tensors[start : start + len(run.slots)]
            start += len(run.slots)
            check_describable(run.slots[0].name, part[0])
            if not (run.alike and write_run(self._at(part[0].device), run, part, executor)):
                for slot, tensor in zip(run.slots, part, strict=True):
                    self._copy(slot, {slot.name: tensor})

    def copy_by_name(self, held: dict[str, torch.Tensor], filling: FillingFor) -> None:
        """Copy every slot, each from the tensor of its name."""
        slots = self._work.layout.slots
        for slot in slots:
            if slot.is_piece and slot.start == 0:
                held[slot.name] = as_bytes(conform(slot.spec, held[slot.name]))
        if not self._fill(slots[0], [held[slot.name] for slot in slots], filling, self._copy_ready):
            for slot in slots:
                self._copy_ready(slot, held[slot.name])
        for slot in slots:
            if slot.is_tail:
                del held[slot.name]

    def _fill(
        self,
        first: Slot,
        tensors: list[torch.Tensor],
        filling: FillingFor,
        write: Callable[[Slot, torch.Tensor], None],
    ) -> bool:
        """Fill the whole bucket by a kernel, if there is one where its buffer is."""
        check_describable(first.name, tensors[0])
        if tensors[0].device.type != "cuda":  # without a buffer yet: its tensor may still be refused
            return False
        buffer = self._at(tensors[0].device)
        found = filling(self._work.layout, buffer.device)
        if found is None:
            return False
        how, digest = found
        self.lanes = how.fill(buffer, tensors, write, digest=digest)
        self._filled = True
        return True

    def _copy_ready(self, slot: Slot, tensor: torch.Tensor) -> None:
        """Copy a slot from its tensor, of a split one from its bytes."""
        plain = tensor if slot.is_piece else conform(slot.spec, tensor)
        write_slot(self._at(plain.device), slot, plain)

    def copy_held(self, held: dict[str, torch.Tensor]) -> None:
        """Copy what was taken earlier and has its place, or its next piece, here."""
        self._slots = {slot.name: slot for slot in self._work.layout.slots}
        for name in [name for name in held if name in self._slots]:
            self._copy(self._slots[name], held)

    def take_one(self, name: str, held: dict[str, torch.Tensor], spec: TensorSpec) -> None:
        """Copy one tensor just taken, or keep a copy of it for the bucket that its group completes in."""
        if spec.alias_of is not None:
            del held[name]
            return
        slot = self._slots.get(name)
        if slot is not None:
            self._copy(slot, held)
        else:
            held[name] = own_copy(conform(spec, held[name]))

    def close(self) -> torch.Tensor:
        """The filled buffer, its padding zeroed: a buffer may have been used before."""
        assert self._buffer is not None  # a layout has a slot, and filling it made the buffer
        if not self._filled:
            zero_padding(self._buffer, self._work.gaps)
        return self._buffer

    def _at(self, device: torch.device) -> torch.Tensor:
        if self._buffer is None:
            self._buffer = self._new_buffer(self._work.layout.nbytes, device)
        return self._buffer

    def _copy(self, slot: Slot, held: dict[str, torch.Tensor]) -> None:
        """Copy one slot. A tensor that is to be split is kept as bytes until its last piece is copied."""
        tensor = held[slot.name]
        if slot.start == 0:
            tensor = conform(slot.spec, tensor)
            if slot.is_piece:
                tensor = held[slot.name] = as_bytes(tensor)
        write_slot(self._at(tensor.device), slot, tensor)
        if slot.is_tail:
            del held[slot.name]


class _Ties:
    """Whether tensors that the plan ties together still are one. Memory can be used again and weights untied, so neither the plan
    nor an address proves it: the bytes are compared unless both tensors are alive and the same view."""

    def __init__(self, places: list[int], *, alive: bool) -> None:
        self._alive = alive  # whether the source keeps its tensors as they are while it is read
        self._places = places
        self._roots: dict[str, tuple[weakref.ref[torch.Tensor], object, torch.device, bytes]] = {}

    def places(self, start: int, end: int) -> list[int]:
        """The places in this part of the source that take part in a tie."""
        return self._places[bisect_left(self._places, start) : bisect_left(self._places, end)]

    def see(self, spec: TensorSpec, tensor: torch.Tensor) -> None:
        if spec.alias_of is None:
            plain = conform(spec, tensor)
            digest = bytes_digest(plain)
            self._roots[spec.name] = (weakref.ref(tensor), view_key(tensor), plain.device, digest)
            return
        ref, key, device, digest = self._roots[spec.alias_of]
        if self._alive and ref() is not None and key is not None and key == view_key(tensor):
            return
        if bytes_digest(conform(spec, tensor).to(device)) != digest:
            raise PlanMismatchError(
                f"the plan ties {spec.name!r} to {spec.alias_of!r}, and the source gives it other bytes; "
                "plan again with specs_of, or with specs_of(..., aliases=False)"
            )
