"""pack and Packer: from named tensors to the buckets of a plan."""

from __future__ import annotations

import weakref
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import AsyncIterable, AsyncIterator, Iterator, Mapping
from concurrent.futures import Executor
from itertools import islice
from typing import TYPE_CHECKING

import torch

from rollout_core.bucketing import cuda
from rollout_core.bucketing.bucket import Bucket, check_version, seal
from rollout_core.bucketing.buffers import Allocate, BufferPool, check_buffer
from rollout_core.bucketing.copying import conform
from rollout_core.bucketing.digest import BLOCK_ALGORITHM, DigestChoice, check_choice, chosen_algorithm
from rollout_core.bucketing.gathering import Gathering
from rollout_core.bucketing.placement import BucketLayout
from rollout_core.bucketing.plan import BucketPlan
from rollout_core.bucketing.sources import AnySource, Pair, Source, Step, adrive, as_mapping, drive, in_loop, named_pairs
from rollout_core.bucketing.specs import TensorSpec
from rollout_core.bucketing.target import NewBuffer, Target, work_of
from rollout_core.bucketing.tensors import bytes_digest, view_key
from rollout_core.errors import PlanMismatchError

if TYPE_CHECKING:
    from rollout_core.bucketing.cuda.packing import Filling


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

    ``executor`` runs the copies of many small tensors as jobs, in threads of this process. torch shares one large copy among its
    threads but not ten thousand small ones; a ``ThreadPoolExecutor(2, initializer=torch.set_num_threads, initargs=(1,))`` does.
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
        self._work = work_of(plan)
        self._fillings: dict[tuple[int, torch.device], Filling] = {}
        self._gatherings: dict[int, Gathering | None] = {}
        self._last: dict[int, Filling] = {}  # those of the round before, by bucket
        self._names = [spec.name for spec in plan.specs]
        self._planned = frozenset(self._names)
        self._tied_places = [i for i, spec in enumerate(plan.specs) if spec.alias_of or spec.name in plan.tied]
        self._round = self._rounds = 0  # the last one's version, and how many there were

    def pack(
        self, source: Source, *, version: int | None = None, unmoved: bool = False, allocate: Allocate | None = None
    ) -> Iterator[Bucket]:
        """One round: see the function ``pack``. ``allocate``: of this round, instead of the packer's own.

        ``unmoved=True`` promises that the source's tensors are alive, and in the memory and layout that they had the round before:
        buckets on a GPU are filled from there, and nothing of the source is looked at, which for ten thousand small tensors is
        what takes the time. Training in place keeps tensors where they are; loading, resharding and ``to`` do not. It has no
        effect on the first round, on other devices, or where some tensors are not contiguous.
        """
        version = self._next_version(version)
        new_buffer = self._buffers(allocate)
        if unmoved and (fillings := self._repeatable()):
            return self._again(fillings, version, new_buffer)
        mapping = as_mapping(source)
        if mapping is not None:
            self._expect_keys(mapping)
            if isinstance(mapping, dict):
                return self._at_once(map(mapping.__getitem__, self._names), version, new_buffer)
            # Any other mapping may make each tensor when asked for it, and in the same memory.
            return drive(self._one_by_one(version, new_buffer), self._by_turn(mapping))
        if isinstance(source, list | tuple):
            return self._at_once(self._in_order(list(named_pairs(source))), version, new_buffer)
        return drive(self._one_by_one(version, new_buffer), named_pairs(source))

    def apack(self, source: AnySource, *, version: int | None = None) -> AsyncIterator[Bucket]:
        """One round: see the function ``apack``."""
        if not isinstance(source, AsyncIterable):
            return in_loop(self.pack(source, version=version))
        return adrive(self._one_by_one(self._next_version(version), self._buffers(None)), source)

    def _next_version(self, version: int | None) -> int:
        self._round = check_version(self._round + 1 if version is None else version)
        self._rounds += 1
        return self._round

    def _expect_keys(self, mapping: Mapping[str, torch.Tensor]) -> None:
        """Raise ``PlanMismatchError`` unless the mapping has the plan's names and no other."""
        if type(mapping) in (dict, OrderedDict) and list(mapping) == self._names:  # the common case: nothing is looked up
            return
        # Not "in mapping": a lazy mapping may load the tensor to answer.
        keys = mapping.keys() if isinstance(mapping, dict) else set(mapping)
        if keys != self._planned:
            missing = [name for name in self._names if name not in keys]
            if missing:
                raise PlanMismatchError(f"the source has no tensor {missing[0]!r}, and the plan has ({len(missing)} missing)")
            extra = next(name for name in mapping if name not in self._planned)
            raise PlanMismatchError(f"the source has a tensor {extra!r} that the plan has not; plan again with specs_of")

    def _by_turn(self, mapping: Mapping[str, torch.Tensor]) -> Iterator[Pair]:
        """The pairs in the plan's order. Not zip, which keeps the last pair, and with it a tensor, until it has made the next."""
        for name in self._names:
            yield name, mapping[name]

    def _in_order(self, pairs: list[Pair]) -> Iterator[torch.Tensor]:
        if self._names:
            self._expect(pairs[: len(self._names)], 0)
        if len(pairs) < len(self._names):
            self._expect([], len(pairs))
        self._expect_end(pairs[len(self._names) :])
        return iter([tensor for _, tensor in pairs])

    def _at_once(self, tensors: Iterator[torch.Tensor], version: int, new_buffer: NewBuffer) -> Iterator[Bucket]:
        """Fill bucket after bucket from a source whose tensors all live side by side, so that those of a bucket may be taken at
        once. ``tensors`` come in the plan's order."""
        self._last.clear()
        ties = _Ties(self._tied_places, alive=True)
        held: dict[str, torch.Tensor] = {}  # taken from the source, and not yet (or not wholly) copied
        place = 0
        for work in self._work:
            taken = list(islice(tensors, work.until - place))
            for at in ties.places(place, work.until):
                ties.see(self.plan.specs[at], taken[at - place])
            target = Target(work, new_buffer)
            if work.in_order:
                target.copy_in_order(taken, self._executor, self._filling, self._gathering)
            else:
                specs = self.plan.specs[place : work.until]
                held.update((spec.name, t) for spec, t in zip(specs, taken, strict=True) if spec.alias_of is None)
                target.copy_by_name(held, self._filling)
            place = work.until
            del taken
            yield self._seal(target, work.layout.index, version)

    def _repeatable(self) -> list[Filling]:
        """How the buckets were filled the last time, if all of them were filled by kernels alone."""
        last = [self._last[work.layout.index] for work in self._work if work.layout.index in self._last]
        return last if len(last) == len(self._work) and all(filling.repeatable for filling in last) else []

    def _again(self, fillings: list[Filling], version: int, new_buffer: NewBuffer) -> Iterator[Bucket]:
        """Fill bucket after bucket from where the tensors were the last time."""
        for filling in fillings:
            layout, device = filling.layout, filling.device
            buffer = new_buffer(layout.nbytes, device)
            if buffer.device != device:
                raise ValueError(f"allocate({layout.nbytes}) returned memory on {buffer.device}, and the tensors are on {device}")
            lanes = filling.repeat(buffer, digest=chosen_algorithm(self._digest, device) == BLOCK_ALGORITHM)
            yield seal(buffer, self._digest, index=layout.index, plan_digest=self.plan.digest, version=version, lanes=lanes)

    def _one_by_one(self, version: int, new_buffer: NewBuffer) -> Step[Bucket]:
        """Fill bucket after bucket, copying each tensor before the next is asked for: the source may use one piece of memory for
        all of them."""
        self._last.clear()
        ties = _Ties(self._tied_places, alive=False)
        held: dict[str, torch.Tensor] = {}
        place = 0
        for work in self._work:
            target = Target(work, new_buffer)
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

    def _seal(self, target: Target, index: int, version: int) -> Bucket:
        buffer = target.close()
        return seal(buffer, self._digest, index=index, plan_digest=self.plan.digest, version=version, lanes=target.lanes)

    def _filling(self, layout: BucketLayout, device: torch.device) -> tuple[Filling, bool] | None:
        """How a kernel fills this bucket, and whether it digests it; None if it is not on a GPU, or no kernel runs there."""
        if not cuda.possible(device):
            return None
        filling = self._fillings.get((layout.index, device))
        if filling is None:
            from rollout_core.bucketing.cuda import launching, packing

            if not launching.usable(device):
                return None
            filling = self._fillings[layout.index, device] = packing.Filling(layout, device)
        self._last[layout.index] = filling
        return filling, chosen_algorithm(self._digest, device) == BLOCK_ALGORITHM

    def _gathering(self, layout: BucketLayout) -> Gathering | None:
        """How compiled code fills this bucket on a CPU; None if it does not, as in a packer's first round, which may be its last:
        what it needs takes longer to make than it saves once."""
        if self._rounds < 2:
            return None
        if layout.index not in self._gatherings:
            self._gatherings[layout.index] = Gathering.of(layout)
        return self._gatherings[layout.index]

    def _buffers(self, allocate: Allocate | None) -> NewBuffer:
        """What gives a round its buffers."""
        given = self._allocate if allocate is None else allocate

        def new_buffer(nbytes: int, device: torch.device) -> torch.Tensor:
            if given is not None:
                return check_buffer(given(nbytes), nbytes)
            return self._pool.take(nbytes, device, room=self._largest)

        return new_buffer


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
