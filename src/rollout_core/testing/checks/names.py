"""B9, B10 and B11: names, tied tensors and groups."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import msgspec
from hypothesis import strategies as st

from rollout_core.testing import strategies
from rollout_core.testing.cases import PackerCase, related_case
from rollout_core.testing.checks.base import (
    NBYTES,
    must_raise,
    packer_check,
    plain,
    plain_cases,
    require_none,
    require_refusal,
    round_trip,
)
from rollout_core.testing.oracles import difference, picture
from rollout_core.testing.packers import PackerUnderTest, bucket_tensors, error_words
from rollout_core.testing.registry import Violation
from rollout_core.testing.strategies import packer_cases

packer_check(
    "packer/B9-names",
    "any non-empty str is a name, and arrives as it is",
    cases=packer_cases(tensors=plain(max_size=4, names=strategies.names())),
)(round_trip)


@st.composite
def _with_duplicate(draw: st.DrawFn) -> PackerCase:
    gap, place, same = draw(st.integers(0, 3)), draw(st.integers(0, 3)), draw(st.booleans())
    case = draw(plain_cases(min_size=2, max_size=4))
    second = len(case.tensors) - 1 - place % (len(case.tensors) - 1)
    first = second - 1 - gap % second
    tensors = list(case.tensors)
    tensors[second] = msgspec.structs.replace(tensors[second], name=tensors[first].name)
    if same:  # the same tensor again is no excuse
        tensors[second] = related_case(tensors[first], first, "tied", tensors[first].name)
    return PackerCase(tensors=tuple(tensors), capacity=case.capacity)


@packer_check(
    "packer/B9-duplicate",
    "a name that comes twice is an error that names it",
    cases=_with_duplicate(),
    script="""
import re

names = [name for name, _ in named]
twice = next(name for name in names if names.count(name) > 1)
try:
    packer.unpack(list(packer.pack(named, capacity)))
except Exception as error:
    assert re.search(rf"(?<!\\w){re.escape(twice)}(?!\\w)", str(error)), f"the error does not name {twice!r}: {error}"
else:
    raise AssertionError("this was not refused")
""",
)
def duplicate(packer: PackerUnderTest, case: PackerCase) -> None:
    names = [tensor.name for tensor in case.tensors]
    twice = next(name for name in names if names.count(name) > 1)
    arrived: list[str] = []

    def send() -> None:
        arrived[:] = [name for name, _ in packer.unpack(packer.pack(case.make(packer.device), case.capacity))]

    error = packer.refusal(send)
    if error is None:
        raise Violation(f"two tensors are called {twice!r}, and no error was raised (sent: {names}, arrived: {arrived})")
    if not re.search(rf"(?<!\w){re.escape(twice)}(?!\w)", str(error)):
        raise Violation(f"two tensors are called {twice!r}, and the error does not say so: {error_words(error)}")


_TIED = plain(min_size=2, max_size=4, relations=st.sampled_from(["tied", "same view", None]))


@packer_check("packer/B10-arrive", "a tied tensor arrives under every one of its names", cases=packer_cases(tensors=_TIED))
def tied_arrive(packer: PackerUnderTest, case: PackerCase) -> None:
    named = case.make(packer.device)
    model = picture(named)
    result = picture(packer.unpack(packer.pack(named, case.capacity)))
    # B10 does not say at which place a tied name arrives.
    require_none(difference(sorted(model, key=lambda p: p.name), sorted(result, key=lambda p: p.name)))


@packer_check(
    "packer/B10-once",
    "a tied tensor travels once",
    cases=packer_cases(tensors=_TIED),
    script=NBYTES
    + """
align = getattr(packer, "align", 1)
distinct = {t.data_ptr(): -(-t.numel() * t.element_size() // align) * align for _, t in named}
buckets = list(packer.pack(named, capacity))
assert sum(map(nbytes, buckets)) <= sum(distinct.values()), [nbytes(b) for b in buckets]
""",
)
def tied_once(packer: PackerUnderTest, case: PackerCase) -> None:
    sent = sum(packer.nbytes(bucket) for bucket in packer.pack(case.make(packer.device), case.capacity))
    distinct = sum(tensor.nbytes + -tensor.nbytes % packer.align for tensor in case.tensors if tensor.of is None)
    if sent > distinct:
        raise Violation(f"{sent} bytes travel for {distinct} bytes of distinct tensors")


@st.composite
def _grouped(draw: st.DrawFn, *, fits: bool = True) -> PackerCase:
    """Two or three names that share a bucket, with others before, between and after. The capacity lets them, with room for
    alignment, or does not."""
    size, step, place = draw(st.integers(2, 3)), draw(st.integers(1, 2)), draw(st.integers(0, 5))
    case = draw(plain_cases(min_size=3, max_size=6))
    last = len(case.tensors) - 1 - place % (len(case.tensors) - 1)
    places = list(range(last, -1, -step))[:size][::-1]
    members = [case.tensors[at] for at in places]
    largest, together = max(tensor.nbytes for tensor in case.tensors), sum(tensor.nbytes for tensor in members)
    group = tuple(tensor.name for tensor in members)
    capacity = max(case.capacity, together) if fits else max(largest, together - 1)
    return PackerCase(tensors=case.tensors, capacity=capacity, groups=(group,))


@packer_check(
    "packer/B11-together",
    "the names of a group lie in one bucket, in their order",
    cases=_grouped(),
    needs=["groups"],
    script="""
buckets = list(packer.pack(named, capacity, groups={groups}))
for bucket in buckets:
    inside = [name for name, _, _ in packer.slots(bucket)] if hasattr(packer, "slots") else [name for name, _ in bucket]
    for group in {groups}:
        assert len(set(inside) & set(group)) in (0, len(group)), (inside, group)
        assert [name for name in inside if name in group] in ([], group), (inside, group)
assert sorted((name, raw(t)) for name, t in packer.unpack(buckets)) == sorted((name, raw(t)) for name, t in named)
""",
)
def group_together(packer: PackerUnderTest, case: PackerCase) -> None:
    named = case.make(packer.device)
    model = picture(named)
    groups = [list(group) for group in case.groups]
    room = packer.align * sum(map(len, groups)) if packer.align > 1 else 0  # for what lies between them
    buckets = packer.pack(named, case.capacity + room, groups=groups)
    for index, bucket in enumerate(buckets):
        names = _names_in(packer, bucket)
        for group in groups:
            inside = [name for name in names if name in group]
            if inside and inside != group:
                raise Violation(f"bucket {index} holds {inside} of the group {group}")
    result = picture(packer.unpack(buckets))
    require_none(difference(sorted(model, key=lambda p: p.name), sorted(result, key=lambda p: p.name)))


@packer_check(
    "packer/B11-too-large",
    "a group that no bucket can hold is an error, or gets a bucket of its own where that is the declared policy",
    cases=_grouped(fits=False),
    needs=["groups"],
    script=NBYTES
    + """
if "oversize=own" not in getattr(packer, "capabilities", ()):
    together = sum(t.numel() * t.element_size() for name, t in named if name in {groups}[0])
    try:
        sizes = [nbytes(bucket) for bucket in packer.pack(named, capacity, groups={groups})]
    except Exception as error:
        print("refused:", error)
    else:
        raise AssertionError(f"a group of {together} bytes was packed with capacity {capacity}: {sizes}")
""",
)
def group_too_large(packer: PackerUnderTest, case: PackerCase) -> None:
    group = list(case.groups[0])
    together = sum(tensor.nbytes for tensor in case.tensors if tensor.name in group)
    if together <= case.capacity or "oversize=own" in packer.capabilities:
        return
    require_refusal(
        packer,
        lambda: packer.pack(case.make(packer.device), case.capacity, groups=[group]),
        f"the group {group} has {together} bytes and the capacity is {case.capacity}",
    )


@packer_check(
    "packer/B11-incomplete",
    "a group that never completes is an error",
    cases=plain_cases(min_size=1, max_size=4).map(
        lambda case: PackerCase(tensors=case.tensors, capacity=1 << 20, groups=((case.tensors[0].name, "missing"),))
    ),
    needs=["groups"],
    script=must_raise("list(packer.pack(named, capacity, groups={groups}))"),
)
def group_incomplete(packer: PackerUnderTest, case: PackerCase) -> None:
    groups = [list(group) for group in case.groups]
    require_refusal(
        packer,
        lambda: packer.pack(case.make(packer.device), case.capacity, groups=groups),
        f"the group {groups[0]} was accepted, and no tensor is called 'missing'",
    )


def _names_in(packer: PackerUnderTest, bucket: Any) -> list[str]:
    if "slots" in packer.capabilities:
        return [name for name, _offset, _nbytes in packer.slots(bucket)]
    if bucket_tensors(bucket) is not None:
        return list(bucket) if isinstance(bucket, Mapping) else [pair[0] for pair in bucket]
    raise Violation("a packer with groups needs slots(bucket), or buckets that are lists of (name, tensor)")
