"""Buckets written into tensors that exist, and views that are kept: on the CPU, by torch."""

from __future__ import annotations

import pytest
import torch

from rollout_core.bucketing import Packer, Unpacker, pack, plan_buckets, specs_of
from rollout_core.errors import IntegrityError, PlanMismatchError
from rollout_core.testing.oracles import bytes_of, picture
from support.tensors import patterned

PAIRS = [
    ("a", patterned(torch.bfloat16, 3, 5)),
    ("none", torch.zeros(0, 2)),
    ("b", patterned(torch.float32, 40)),
    ("c", torch.tensor(7.0)),
]


def fresh(pairs=PAIRS):
    return {name: torch.full_like(tensor, -1) for name, tensor in pairs}


@pytest.mark.parametrize("order", ["given", "packed"])
@pytest.mark.parametrize("capacity", [16, 64, 1 << 20])
def test_b1_into(capacity, order):
    plan = plan_buckets(specs_of(PAIRS), capacity, order=order)
    into = fresh()
    unpacker = Unpacker(plan, into=into)
    out = [pair for bucket in pack(plan, PAIRS) for pair in unpacker.feed(bucket)]
    unpacker.close()
    assert [name for name, _ in out] == list(plan.arrival)
    assert all(tensor.data_ptr() == into[name].data_ptr() for name, tensor in out)
    assert picture([(name, into[name]) for name, _ in PAIRS]) == picture(PAIRS)


@pytest.mark.parametrize("capacity", [600, 1 << 20])
def test_b1_into_again(capacity):
    """Round after round: each has its own values in the same tensors, and what was handed out is nobody's to change."""
    plan = plan_buckets(specs_of(PAIRS), capacity)
    packer, into = Packer(plan), fresh()
    unpacker = Unpacker(plan, into=into)
    for turn in range(3):
        pairs = [(name, tensor + turn if tensor.is_floating_point() else tensor) for name, tensor in PAIRS]
        unpacker.restart()
        out = []
        for bucket in packer.pack(pairs):
            found = unpacker.feed(bucket)
            out += found
            found.clear()
        unpacker.close()
        assert [name for name, _ in out] == [name for name, _ in PAIRS]
        assert all(tensor is into[name] or tensor.data_ptr() == into[name].data_ptr() for name, tensor in out)
        assert all(bytes_of(into[name]) == bytes_of(tensor) for name, tensor in pairs)


def test_b10_tied_tensors_are_written_once_and_handed_out_under_each_name():
    weight = patterned(torch.float32, 8)
    pairs = [("w", weight), ("tied", weight)]
    plan = plan_buckets(specs_of(pairs), 1 << 20)
    mine = torch.zeros(8)
    (bucket,) = pack(plan, pairs)
    out = Unpacker(plan, into={"w": mine}).feed(bucket)
    assert [name for name, _ in out] == ["w", "tied"]
    assert out[0][1] is out[1][1]
    assert bytes_of(mine) == bytes_of(weight)


def test_b10_a_tied_name_with_a_tensor_of_its_own_is_refused():
    weight = patterned(torch.float32, 8)
    pairs = [("w", weight), ("tied", weight)]
    plan = plan_buckets(specs_of(pairs), 1 << 20)
    mine = torch.zeros(8)
    with pytest.raises(PlanMismatchError, match="ties 'tied' to 'w', and to write into they are two tensors"):
        Unpacker(plan, into={"w": mine, "tied": torch.zeros(8)})
    one = torch.nn.Parameter(mine, requires_grad=False)
    (bucket,) = pack(plan, pairs)
    Unpacker(plan, into={"w": mine, "tied": one}).feed(bucket)
    assert bytes_of(one.detach()) == bytes_of(weight)


def test_b13_nothing_is_written_before_it_is_verified():
    plan = plan_buckets(specs_of(PAIRS), 1 << 20)
    into = fresh()
    (bucket,) = pack(plan, PAIRS)
    bucket.buffer[3] ^= 1
    with pytest.raises(IntegrityError):
        Unpacker(plan, into=into).feed(bucket)
    assert picture(into.items()) == picture(fresh().items())


def test_a_parameter_is_written_without_a_gradient():
    weight = torch.nn.Parameter(torch.zeros(40))
    pairs = [("b", PAIRS[2][1])]
    plan = plan_buckets(specs_of(pairs), 1 << 20)
    (bucket,) = pack(plan, pairs)
    Unpacker(plan, into={"b": weight}).feed(bucket)
    assert bytes_of(weight.detach()) == bytes_of(PAIRS[2][1])


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (None, "there is no tensor 'b' to write into"),
        (torch.zeros(41), r"tensor 'b' is f32\[40\] in the plan, and the one to write into is f32\[41\]"),
        (torch.zeros(40, dtype=torch.int32), r"the one to write into is i32\[40\]"),
        (torch.zeros(80)[::2], "the tensor 'b' to write into is not contiguous memory"),
        (torch.zeros(40, device="meta"), "the tensor 'b' to write into is on the meta device and has no memory"),
        (torch._neg_view(torch.zeros(40)), "the tensor 'b' to write into is not contiguous memory"),
    ],
)
def test_what_cannot_be_written_into_is_refused_before_anything_is(tensor, words):
    into = fresh()
    del into["b"]
    if tensor is not None:
        into["b"] = tensor
    with pytest.raises(PlanMismatchError, match=words):
        Unpacker(plan_buckets(specs_of(PAIRS), 1 << 20), into=into)


@pytest.mark.parametrize("other", [{"copy": True}, {"reuse": True}, {"memory": lambda spec: None}])
def test_into_goes_with_no_other_way_of_handing_out(other):
    with pytest.raises(ValueError, match="into= takes everything out of the buckets"):
        Unpacker(plan_buckets(specs_of(PAIRS), 1 << 20), into=fresh(), **other)


@pytest.mark.parametrize("capacity", [32, 1 << 20])
def test_b1_reuse_gives_each_rounds_values(capacity):
    """Views of buckets in the same memory are kept; split tensors are joined anew."""
    plan = plan_buckets(specs_of(PAIRS), capacity)
    memory = [torch.zeros(layout.nbytes + 16, dtype=torch.uint8) for layout in plan.buckets]
    unpacker = Unpacker(plan, reuse=True)
    seen = []
    for version in (1, 2, 3):
        source = [(name, tensor * version) for name, tensor in PAIRS]
        places = iter(memory)
        unpacker.restart()
        out = []
        for bucket in Packer(plan, allocate=lambda nbytes, places=places: next(places)[:nbytes]).pack(source, version=version):
            out += unpacker.feed(bucket)
        assert picture(out) == picture([(name, dict(source)[name]) for name in plan.arrival])
        seen.append([tensor for _, tensor in out])
    kept = [first is last for first, last in zip(seen[0], seen[-1], strict=True)]
    assert all(kept) if capacity > 32 else not all(kept)


def test_reuse_with_copies_keeps_nothing():
    plan = plan_buckets(specs_of(PAIRS), 1 << 20)
    unpacker = Unpacker(plan, reuse=True, copy=True)
    (bucket,) = pack(plan, PAIRS)
    first = unpacker.feed(bucket)
    unpacker.restart()
    (bucket,) = pack(plan, PAIRS, version=1, allocate=lambda nbytes: bucket.buffer)
    assert not any(mine is other for (_, mine), (_, other) in zip(first, unpacker.feed(bucket), strict=True))


def test_unmoved_on_the_cpu_looks_at_the_source():
    plan = plan_buckets(specs_of(PAIRS), 1 << 20)
    packer = Packer(plan)
    list(packer.pack(PAIRS))
    other = [(name, tensor + 1) for name, tensor in PAIRS]
    (bucket,) = packer.pack(other, unmoved=True)
    assert picture(Unpacker(plan).feed(bucket)) == picture(other)
