"""iter_buckets: what verl's get_named_tensor_buckets promises, and what it does not keep."""

from __future__ import annotations

import asyncio
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rollout_core.bucketing import aiter_buckets, iter_buckets
from rollout_core.errors import CapacityError
from rollout_core.testing.oracles import picture
from support.tensors import capacities, named, odd_inputs, patterned

MIB = 1 << 20


@pytest.mark.parametrize(
    ("capacity", "expected"),
    [(MIB // 2, [["a"], ["b"]]), (MIB, [["a"], ["b"]]), (3 * MIB // 2, [["a"], ["b"]]), (2 * MIB, [["a", "b"]])],
)
def test_verls_own_cases(capacity, expected):
    pairs = [("a", torch.zeros(MIB, dtype=torch.uint8)), ("b", torch.zeros(MIB, dtype=torch.uint8))]
    assert [[name for name, _ in bucket] for bucket in iter_buckets(pairs, capacity)] == expected


@given(st.data())
def test_lists_hold_everything_in_order_and_within_capacity(data):
    pairs = data.draw(named())
    capacity = data.draw(capacities(pairs))
    buckets = list(iter_buckets(pairs, capacity, copy=data.draw(st.booleans())))
    assert picture(pair for bucket in buckets for pair in bucket) == picture(pairs)
    sizes = [[t.numel() * t.dtype.itemsize for _, t in bucket] for bucket in buckets]
    assert all(bucket for bucket in sizes), "no list is empty"
    assert all(sum(bucket) <= capacity or len(bucket) == 1 for bucket in sizes)
    for bucket, after in itertools.pairwise(sizes):
        assert sum(bucket) + after[0] > capacity, "cut only when the next would exceed"


def test_odd_inputs_survive_the_copy():
    pairs = list(odd_inputs().items())
    out = [pair for bucket in iter_buckets(pairs, 64) for pair in bucket]
    assert picture(out) == picture(pairs)
    assert all(tensor.is_contiguous() for _, tensor in out)


def test_oversize_error():
    with pytest.raises(CapacityError, match=r"tensor 'w' \(u8\[9\], 9 bytes\) is larger than the capacity of 8 bytes; raise the"):
        list(iter_buckets([("w", torch.zeros(9, dtype=torch.uint8))], 8, oversize="error"))


def test_b2_oversize_error_is_for_what_is_larger_and_nothing_else():
    pairs = [("a", patterned(torch.uint8, 3)), ("b", patterned(torch.uint8, 8)), ("c", patterned(torch.uint8, 5))]
    buckets = list(iter_buckets(pairs, 8, oversize="error"))
    assert [[name for name, _ in bucket] for bucket in buckets] == [["a"], ["b"], ["c"]]


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [([8, 4, 5], [[8], [4], [5]]), ([8, 4, 4], [[8], [4, 4]]), ([4, 4, 1], [[4, 4], [1]]), ([9, 8, 1], [[9], [8], [1]])],
)
def test_b2_every_list_is_filled_from_zero(sizes, expected):
    pairs = [(f"w{i}", patterned(torch.uint8, size)) for i, size in enumerate(sizes)]
    assert [[tensor.numel() for _, tensor in bucket] for bucket in iter_buckets(pairs, 8)] == expected


async def as_async(pairs):
    for pair in pairs:
        yield pair


@pytest.mark.parametrize("make", [list, iter, as_async], ids=["list", "iterator", "async"])
def test_b8_async_lists_take_the_same_options(make):
    pairs = [("a", patterned(torch.uint8, 3)), ("b", patterned(torch.uint8, 9))]

    def collect(**options):
        async def run():
            return [bucket async for bucket in aiter_buckets(make(pairs), 8, **options)]

        return asyncio.run(run())

    copied = collect()
    assert picture(pair for bucket in copied for pair in bucket) == picture(pairs)
    assert not {t.data_ptr() for _, t in pairs} & {t.data_ptr() for bucket in copied for _, t in bucket}
    handed_on = collect(copy=False)
    assert [t.data_ptr() for bucket in handed_on for _, t in bucket] == [t.data_ptr() for _, t in pairs]
    with pytest.raises(CapacityError, match=r"tensor 'b' \(u8\[9\], 9 bytes\) is larger than the capacity"):
        collect(oversize="error")
