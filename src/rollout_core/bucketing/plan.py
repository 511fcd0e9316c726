"""BucketPlan: the immutable layout of specs into buckets, a pure function of specs and options."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import TypeAlias

from rollout_core.bucketing.placement import BucketLayout, Filler, Options, Order, Oversize, Slot
from rollout_core.bucketing.recipes import Recipe
from rollout_core.bucketing.specs import TensorSpec, check_unique
from rollout_core.errors import PlanMismatchError, SourceError

Groups: TypeAlias = tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class BucketPlan:
    """The layout of specs into buckets. Made by ``plan_buckets`` or ``from_bytes``, which check it; plain data.

    ``specs`` are in source order, tied names included. ``groups`` hold the names that share a bucket, in source order.
    """

    specs: tuple[TensorSpec, ...]
    options: Options
    groups: Groups
    buckets: tuple[BucketLayout, ...]

    @property
    def capacity(self) -> int:
        """Bytes that no bucket exceeds, unless oversize is ``own``."""
        return self.options.capacity

    @cached_property
    def nbytes(self) -> int:
        """Bytes of tensor data that travel: tied tensors once, padding not counted."""
        return sum(spec.nbytes for spec in self.specs if spec.alias_of is None)

    @cached_property
    def padding(self) -> int:
        """Zero bytes that travel between tensors to keep them aligned."""
        return sum(layout.nbytes for layout in self.buckets) - self.nbytes

    @cached_property
    def oversized(self) -> tuple[str, ...]:
        """Names of tensors that got a bucket of their own because they exceed the capacity."""
        return tuple(layout.slots[0].name for layout in self.buckets if layout.nbytes > self.options.capacity)

    @cached_property
    def split(self) -> tuple[str, ...]:
        """Names of tensors that travel in pieces."""
        return tuple(slot.name for layout in self.buckets for slot in layout.slots if slot.is_piece and slot.is_tail)

    @cached_property
    def tied(self) -> dict[str, tuple[str, ...]]:
        """For each tensor that has other names, those names."""
        tied: dict[str, list[str]] = {}
        for spec in self.specs:
            if spec.alias_of is not None:
                tied.setdefault(spec.alias_of, []).append(spec.name)
        return {name: tuple(others) for name, others in tied.items()}

    @cached_property
    def arrival(self) -> tuple[str, ...]:
        """All names in the order in which an Unpacker hands them out: source order, except that a tied name comes right after the
        tensor it names (a receiver may reuse the bucket) and a group comes where its last member stands."""
        roots = [spec for unit in units(self.specs, self.groups) for spec in unit]
        return tuple(name for spec in roots for name in (spec.name, *self.tied.get(spec.name, ())))

    @cached_property
    def recipes(self) -> tuple[Recipe, ...]:
        """For each bucket how its tensors are made of its bytes, in ``arrival`` order."""
        orders = [layout.slots for layout in self.buckets]
        if self.options.order != "given":
            rank = {name: place for place, name in enumerate(self.arrival)}
            orders = [tuple(sorted(slots, key=lambda slot: rank[slot.name])) for slots in orders]
        return tuple(Recipe.of(slots, self.tied) for slots in orders)

    @cached_property
    def digest(self) -> bytes:
        """16 bytes that are equal for equal plans: BLAKE2b-128 of the manifest's canonical, uncompressed form."""
        from rollout_core.bucketing.manifest import canonical_digest

        return canonical_digest(self)

    def to_bytes(self) -> bytes:
        """The manifest: versioned MessagePack, compressed (format: docs/manifest.md). Made once."""
        return self._manifest

    @cached_property
    def _manifest(self) -> bytes:
        from rollout_core.bucketing.manifest import encode

        return encode(self)

    @classmethod
    def from_bytes(cls, data: bytes, *, max_tensors: int = 1 << 20, max_nbytes: int = 64 << 20) -> BucketPlan:
        """Read a manifest, or raise ``ManifestError``.

        ``max_tensors`` bounds the tensors and the slots, ``max_nbytes`` the manifest's uncompressed size in bytes; both are
        checked before anything of that size is allocated. Peak memory stays under ``10 * max_nbytes + 1024 * max_tensors``.
        """
        from rollout_core.bucketing.manifest import decode

        return decode(data, max_tensors=max_tensors, max_nbytes=max_nbytes)

    def require_same(self, other: BucketPlan) -> None:
        """Raise ``PlanMismatchError`` naming the first difference, unless ``other`` equals this plan. Call it on what the other
        side sent before any payload moves."""
        difference = first_difference(self, other)
        if difference is not None:
            raise PlanMismatchError(f"the two sides have different plans: {difference}")

    def __getstate__(self) -> dict[str, object]:
        """Without what is worked out of it, which is as large."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def __str__(self) -> str:
        return (
            f"{len(self.specs)} tensors, {self.nbytes} bytes in {len(self.buckets)} buckets of at most {self.capacity}, "
            f"{self.padding} bytes of padding, {len(self.split)} split, {len(self.oversized)} over capacity"
        )


def plan_buckets(
    specs: Iterable[TensorSpec],
    capacity: int,
    *,
    oversize: Oversize = "split",
    order: Order = "given",
    align: int = 1,
    groups: Iterable[Iterable[str]] = (),
) -> BucketPlan:
    """Lay specs out into buckets of at most ``capacity`` bytes, greedily in their order.

    ``oversize``, ``order`` and ``align``: see ``Options``. ``groups``: names that land in one bucket; a group is placed where its
    last member stands, its members in source order.

    Raises ``CapacityError`` (capacity no positive int; a tensor or group that cannot be placed), ``DuplicateNameError``, or
    ``SourceError`` (a group or alias that names a tensor which is not there).
    """
    options = Options(capacity=capacity, oversize=oversize, order=order, align=align)
    frozen = tuple(specs)
    for spec in frozen:
        if type(spec) is not TensorSpec:
            raise SourceError(f"plan_buckets takes TensorSpecs and was given a {type(spec).__name__}; call specs_of(...) first")
    check_unique(frozen)
    check_aliases(frozen)
    canonical = _canonical_groups(frozen, groups)
    filler = Filler(options)
    layouts: list[BucketLayout] = []
    for unit in units(frozen, canonical):
        layouts += filler.add(unit)
    layouts += filler.finish()
    return BucketPlan(frozen, options, canonical, tuple(layouts))


def check_aliases(specs: Sequence[TensorSpec]) -> None:
    """Raise ``SourceError`` unless every tied name refers to an earlier, untied tensor of the same dtype and shape."""
    if all(spec.alias_of is None for spec in specs):
        return
    roots: dict[str, TensorSpec] = {}
    for spec in specs:
        if spec.alias_of is None:
            roots[spec.name] = spec
            continue
        root = roots.get(spec.alias_of)
        if root is None:
            raise SourceError(f"tensor {spec.name!r} is tied to {spec.alias_of!r}, which is no untied tensor that comes before it")
        if (root.dtype, root.shape) != (spec.dtype, spec.shape):
            raise SourceError(f"tensor {spec.name!r} ({spec}) is tied to {root.name!r}, which is {root}")


def _canonical_groups(specs: Sequence[TensorSpec], groups: Iterable[Iterable[str]]) -> Groups:
    """Groups as tuples of travelling names in source order, themselves ordered by where they complete."""
    declared = list(groups)
    if not declared:
        return ()
    places = {spec.name: place for place, spec in enumerate(specs)}
    roots = {spec.name: spec.alias_of or spec.name for spec in specs}
    owner: dict[str, int] = {}
    members: list[set[str]] = []
    for number, group in enumerate(declared):
        if isinstance(group, str):
            raise SourceError(f"group {number} is the str {group!r}; a group is a list of names")
        names = list(group)
        missing = [name for name in names if name not in places]
        if missing:
            raise SourceError(f"group {number} never completes: no tensor is named {missing[0]!r} ({len(missing)} missing)")
        members.append({roots[name] for name in names})
        for name in members[-1]:
            if owner.setdefault(name, number) != number:
                raise SourceError(f"tensor {name!r} is in groups {owner[name]} and {number}; it can be in one")
    ordered = [tuple(sorted(group, key=places.__getitem__)) for group in members if len(group) > 1]
    return tuple(sorted(ordered, key=lambda group: places[group[-1]]))


def units(specs: Sequence[TensorSpec], groups: Groups) -> list[list[TensorSpec]]:
    """What is placed together, in the order of placing: each travelling tensor alone, or a group at its last member."""
    if not groups:
        return [[spec] for spec in specs if spec.alias_of is None]
    last_of = {group[-1]: group for group in groups}
    grouped = {name for group in groups for name in group}
    by_name = {spec.name: spec for spec in specs}
    placed = []
    for spec in specs:
        if spec.name in last_of:
            placed.append([by_name[name] for name in last_of[spec.name]])
        elif spec.alias_of is None and spec.name not in grouped:
            placed.append([spec])
    return placed


def first_difference(ours: BucketPlan, theirs: BucketPlan) -> str | None:
    """The first thing in which two plans differ, in words; None if they are equal."""
    if ours == theirs:
        return None
    for field in Options.__struct_fields__:
        mine, other = getattr(ours.options, field), getattr(theirs.options, field)
        if mine != other:
            return f"{field} is {mine!r} here and {other!r} there"
    for place, (mine, other) in enumerate(zip(ours.specs, theirs.specs, strict=False)):
        if mine != other:
            return f"tensor {place} is {_spec_words(mine)} here and {_spec_words(other)} there"
    if len(ours.specs) != len(theirs.specs):
        longer, where = (ours, "only here") if len(ours.specs) > len(theirs.specs) else (theirs, "only there")
        place = min(len(ours.specs), len(theirs.specs))
        return f"tensor {place} is {_spec_words(longer.specs[place])} {where}"
    if ours.groups != theirs.groups:
        only = set(ours.groups) ^ set(theirs.groups)
        return f"the group {sorted(only)[0]} is declared on one side only"
    return _layout_difference(ours, theirs)


def _layout_difference(ours: BucketPlan, theirs: BucketPlan) -> str:
    mine = [(layout.index, slot) for layout in ours.buckets for slot in layout.slots]
    other = [(layout.index, slot) for layout in theirs.buckets for slot in layout.slots]
    place = next((i for i, (a, b) in enumerate(zip(mine, other, strict=False)) if a != b), min(len(mine), len(other)))
    return f"slot {place} is {_slot_words(mine, place)} here and {_slot_words(other, place)} there"


def _spec_words(spec: TensorSpec) -> str:
    return f"{spec.name!r} {spec}" + (f" tied to {spec.alias_of!r}" if spec.alias_of else "")


def _slot_words(slots: Sequence[tuple[int, Slot]], place: int) -> str:
    if place >= len(slots):
        return "missing"
    index, slot = slots[place]
    return f"{slot.name!r} bytes {slot.start} to {slot.start + slot.nbytes} at offset {slot.offset} of bucket {index}"
