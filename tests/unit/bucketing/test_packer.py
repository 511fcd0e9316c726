"""What a Packer promises besides the bytes: rounds, options, ties in memory that changes, and how much it asks for and keeps."""

from __future__ import annotations

import asyncio
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from rollout_core.bucketing import (
    BucketLayout,
    Options,
    Packer,
    Slot,
    TensorSpec,
    apack,
    apack_stream,
    pack,
    pack_stream,
    packer,
    plan_buckets,
    specs_of,
    unpack,
)
from rollout_core.errors import PlanMismatchError
from rollout_core.testing.oracles import picture
from support.tensors import patterned

F32 = torch.float32
PAIRS = [(f"w{i}", patterned(F32, 2, seed=i)) for i in range(4)]


async def as_async(pairs):
    for pair in pairs:
        yield pair


def collect(source):
    async def run():
        return [item async for item in source]

    return asyncio.run(run())


# ------------------------------------------------------------------------------------------------------- rounds and options


def test_b13_rounds_are_numbered_from_one_or_from_what_was_given():
    packer = Packer(plan_buckets(specs_of(PAIRS), 16))
    assert [{bucket.version for bucket in packer.pack(PAIRS)} for _ in range(3)] == [{1}, {2}, {3}]
    assert {bucket.version for bucket in packer.pack(PAIRS, version=7)} == {7}
    assert {bucket.version for bucket in packer.pack(dict(PAIRS))} == {8}
    assert {bucket.version for bucket in collect(packer.apack(iter(PAIRS)))} == {9}
    assert {bucket.version for bucket in collect(packer.apack(as_async(PAIRS)))} == {10}
    assert {bucket.version for bucket in collect(packer.apack(PAIRS, version=20))} == {20}
    assert {bucket.version for bucket in collect(packer.apack(as_async(PAIRS), version=30))} == {30}


@pytest.mark.parametrize("make", [list, iter, dict, as_async], ids=["list", "iterator", "dict", "async"])
@pytest.mark.parametrize("kind", ["plan", "stream"])
def test_async_packing_takes_the_same_options(kind, make):
    plan = plan_buckets(specs_of(PAIRS), 16)
    allocated = []

    def allocate(nbytes):
        allocated.append(nbytes)
        return torch.empty(nbytes, dtype=torch.uint8)

    def packed(**options):
        return collect(apack(plan, make(PAIRS), **options) if kind == "plan" else apack_stream(make(PAIRS), 16, **options))

    assert {(bucket.version, bucket.algorithm) for bucket in packed()} == {(0, "xxh3-128")}
    assert {bucket.version for bucket in packed(version=5)} == {5}
    assert {(bucket.algorithm, bucket.digest) for bucket in packed(digest=None)} == {("none", None)}
    assert {bucket.algorithm for bucket in packed(digest="multilinear-128")} == {"multilinear-128"}
    assert allocated == []
    packed(allocate=allocate)
    assert allocated == [16, 16]


@pytest.mark.parametrize("make", [list, as_async], ids=["list", "async"])
def test_async_streams_take_the_same_layout_options(make):
    a, b, c = patterned(torch.uint8, 3), patterned(torch.uint8, 9), patterned(torch.uint8, 3, seed=5)
    pairs = [("a", a), ("b", b), ("c", c), ("a again", a)]

    def sizes(**options):
        return [bucket.nbytes for bucket in collect(apack_stream(make(pairs), 8, **options))]

    ties = {"a again": "a"}
    assert sizes(aliases=ties) == [3, 8, 4]
    assert sizes(aliases={}) == [3, 8, 7]
    assert sizes(aliases=ties, oversize="own") == [3, 9, 3]
    assert sizes(aliases=ties, align=4) == [3, 8, 7]
    assert sizes(aliases=ties, groups=[["a", "c"]]) == [8, 7]


def test_an_executor_serves_small_models_too():
    """Of which no job is worth its making."""
    with ThreadPoolExecutor(2) as pool:
        packer = Packer(plan_buckets(specs_of(PAIRS), 64), executor=pool)
        assert picture(unpack(packer.plan, packer.pack(PAIRS))) == picture(PAIRS)


def test_options_that_are_not_given():
    assert Options(capacity=8) == Options(capacity=8, oversize="split", order="given", align=1)
    assert Options(capacity=8) == plan_buckets([], 8).options


def test_the_largest_options_there_are():
    assert Options(capacity=2**63 - 1, align=1 << 20).align == 1 << 20
    plan = plan_buckets(specs_of(PAIRS), 2**63 - 1, align=1 << 20)
    assert [slot.offset for slot in plan.buckets[0].slots] == [0, 1 << 20, 2 << 20, 3 << 20]


def test_b4_gaps_are_what_lies_between_the_slots():
    slots = [Slot(TensorSpec(name, torch.uint8, (4,)), offset, 4) for name, offset in (("a", 2), ("b", 6), ("c", 16))]
    layout = BucketLayout(0, 20, tuple(slots))
    assert layout.gaps() == [(0, 2), (10, 6)]
    assert layout.padding == 8
    assert BucketLayout(0, 4, (Slot(slots[0].spec, 0, 4),)).gaps() == []


# --------------------------------------------------------------------------------------------------------------------- ties


def tied_plan(*names, capacity=64):
    return plan_buckets([TensorSpec("a", F32, (4,)), *(TensorSpec(name, F32, (4,), "a") for name in names)], capacity)


def test_b10_one_memory_under_two_names_is_a_tie_only_while_its_bytes_are():
    """A generator may write into the memory that it yielded: that it yields it again proves nothing."""
    memory = torch.empty(4)

    def source(second):
        for name, value in (("a", 1.0), ("b", second)):
            yield name, memory.fill_(value)

    plan = tied_plan("b")
    assert [name for name, _ in unpack(plan, pack(plan, source(1.0)))] == ["a", "b"]
    with pytest.raises(PlanMismatchError, match="the plan ties 'b' to 'a', and the source gives it other bytes"):
        list(pack(plan, source(2.0)))


def test_b10_a_tie_to_a_tensor_that_is_gone_is_proven_by_bytes():
    """The caller replaces tensors between two buckets: an address says nothing once its tensor is gone."""
    memory = torch.ones(4)
    plan = plan_buckets([TensorSpec("a", F32, (4,)), TensorSpec("x", F32, (4,)), TensorSpec("b", F32, (4,), "a")], 16)
    for change in (False, True):
        source = {"a": memory.view(4), "x": torch.zeros(4), "b": memory.view(4)}
        buckets = pack(plan, source)
        next(buckets)
        del source["a"]
        memory += change
        if change:
            with pytest.raises(PlanMismatchError, match="the plan ties 'b' to 'a', and the source gives it other bytes"):
                next(buckets)
        else:
            next(buckets)


def test_b10_an_empty_tensor_that_is_tied_still_has_a_dtype():
    plan = plan_buckets([TensorSpec("a", F32, (0,)), TensorSpec("b", F32, (0,), "a")], 16)
    for make in (list, dict, iter):
        with pytest.raises(PlanMismatchError, match=r"tensor 'b' of the source is i32\[0\], and of the plan f32\[0\]"):
            list(pack(plan, make([("a", torch.empty(0)), ("b", torch.empty(0, dtype=torch.int32))])))


@pytest.mark.parametrize(("make", "hashed"), [(list, 1), (dict, 1), (iter, 3)], ids=["list", "dict", "iterator"])
def test_b10_ties_cost_no_more_than_they_must(monkeypatch, make, hashed):
    """Where the tensors stay as they are, one view under three names is proven by that; and who has no tie is never hashed."""
    calls = []
    original = packer.bytes_digest
    monkeypatch.setattr(packer, "bytes_digest", lambda tensor: calls.append(1) or original(tensor))
    weight = patterned(F32, 4)
    pairs = [("x", patterned(F32, 4, seed=2)), ("a", weight), ("b", weight), ("y", patterned(F32, 4, seed=3)), ("c", weight)]
    plan = plan_buckets(specs_of(pairs), 64)
    assert plan.tied == {"a": ("b", "c")}
    assert dict(unpack(plan, pack(plan, make(pairs)))).keys() == dict(pairs).keys()
    assert len(calls) == hashed


# -------------------------------------------------------------------------------------------- what is asked for, and what is kept


@pytest.mark.parametrize("specs", [[], PAIRS], ids=["empty plan", "plan"])
def test_b15_a_source_that_goes_on_is_asked_for_one_tensor_more(specs):
    asked = []

    def source():
        for i in range(10):
            asked.append(i)
            yield f"w{i}", patterned(F32, 2, seed=i)

    plan = plan_buckets(specs_of(specs), 16)
    with pytest.raises(PlanMismatchError, match=f"the source goes on with 'w{len(specs)}' after the plan's {len(specs)} tensors"):
        list(pack(plan, source()))
    assert len(asked) == len(specs) + 1


def test_b15_what_a_bucket_was_made_of_may_go_while_it_is_sent():
    source = {f"w{i}": patterned(F32, 2, seed=i) for i in range(4)}
    plan = plan_buckets(specs_of(source), 16)
    watch = [weakref.ref(tensor) for tensor in source.values()]
    buckets = pack(plan, source)
    next(buckets)
    del source["w0"], source["w1"]
    assert [ref() is None for ref in watch] == [True, True, False, False]
    assert picture(source.items()) == picture((f"w{i}", patterned(F32, 2, seed=i)) for i in (2, 3))


@pytest.mark.parametrize("kind", ["plan", "stream"])
def test_b15_a_tied_tensor_is_let_go_when_it_has_been_compared(kind):
    alive = weakref.WeakSet()
    names = ["a", "b", "c", "d"]
    peak = []

    def source():
        for name in names:
            tensor = patterned(F32, 4)
            alive.add(tensor)
            peak.append(len(alive))
            yield name, tensor
            del tensor

    buckets = (
        pack(tied_plan(*names[1:]), source()) if kind == "plan" else pack_stream(source(), 64, aliases=dict.fromkeys("bcd", "a"))
    )
    assert len(list(buckets)) == 1
    assert peak == [1, 1, 1, 1]
