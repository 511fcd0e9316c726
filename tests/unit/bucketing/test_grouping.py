"""iter_buckets: what verl's get_named_tensor_buckets promises, and what it does not keep."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rollout_core.bucketing import iter_buckets
from rollout_core.errors import CapacityError
from support.oracle import picture
from support.tensors import capacities, named, odd_inputs

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
