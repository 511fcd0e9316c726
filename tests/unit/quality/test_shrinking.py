"""Counterexamples shrink to the exact smallest example: what a strategy draws decides how readable a report is."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, Phase, find, settings
from hypothesis import strategies as st

from rollout_core.testing import strategies
from rollout_core.testing.machines import programs
from rollout_core.testing.strategies import packer_cases, tensor_cases

SETTINGS = settings(
    max_examples=2000,
    database=None,
    deadline=None,
    derandomize=True,
    phases=(Phase.generate, Phase.shrink),
    suppress_health_check=[HealthCheck.too_slow],
)
ANY = tensor_cases(layouts=strategies.layouts(), fills=strategies.fills(), relations=strategies.relations())


def smallest(strategy, condition):
    return find(strategy, condition, settings=SETTINGS)


def dtypes_of(case):
    return [tensor.dtype for tensor in case.tensors]


CASES = {
    "anything": (packer_cases(tensors=ANY), lambda c: True, "capacity 1 bytes; no tensors"),
    "one tensor": (packer_cases(tensors=ANY), lambda c: c.tensors, "capacity 4 bytes; 'a' f32[1]"),
    "three tensors": (
        packer_cases(tensors=ANY),
        lambda c: len(c.tensors) >= 3,
        "capacity 12 bytes; 'a' f32[1]; 'b' f32[1]; 'c' f32[1]",
    ),
    "misaligned": (
        packer_cases(tensors=ANY),
        lambda c: any(a.nbytes % b.torch_dtype.itemsize for a, b in zip(c.tensors, c.tensors[1:], strict=False)),
        "capacity 6 bytes; 'a' bf16[1]; 'b' f32[1]",
    ),
    "no elements": (packer_cases(tensors=ANY), lambda c: any(0 in t.shape for t in c.tensors), "capacity 1 bytes; 'a' f32[0]"),
    "0-d": (packer_cases(tensors=ANY), lambda c: any(not t.shape for t in c.tensors), "capacity 4 bytes; 'a' f32[]"),
    "strided": (
        packer_cases(tensors=ANY),
        lambda c: any(t.layout == "strided" for t in c.tensors),
        "capacity 4 bytes; 'a' f32[1], strided",
    ),
    "transposed": (
        packer_cases(tensors=ANY),
        lambda c: any(t.layout == "transposed" and t.shape[0] != t.shape[1] and 1 not in t.shape for t in c.tensors),
        "capacity 24 bytes; 'a' f32[2, 3], transposed",
    ),
    "conjugate": (
        packer_cases(tensors=ANY),
        lambda c: any(t.layout == "conj" for t in c.tensors),
        "capacity 8 bytes; 'a' c64[1], conj",
    ),
    "NaN": (
        packer_cases(tensors=ANY),
        lambda c: any(t.fill == "special" for t in c.tensors),
        "capacity 4 bytes; 'a' f32[1], NaN payloads and -0.0",
    ),
    "tied": (
        packer_cases(tensors=ANY),
        lambda c: any(t.of is not None and t.relation == "tied" for t in c.tensors),
        "capacity 8 bytes; 'a' f32[1]; 'b' f32[1], the same tensor as 'a'",
    ),
    "shares storage": (
        packer_cases(tensors=ANY),
        lambda c: any(t.of is not None and t.relation == "tail" for t in c.tensors),
        "capacity 12 bytes; 'a' f32[2]; 'b' f32[1], the end of 'a'",
    ),
    "exact fit of two": (
        packer_cases(tensors=ANY),
        lambda c: len(c.tensors) >= 2 and c.tensors[0].nbytes and c.tensors[0].nbytes + c.tensors[1].nbytes == c.capacity,
        "capacity 8 bytes; 'a' f32[1]; 'b' f32[1]",
    ),
    "one byte short of two": (
        packer_cases(tensors=ANY),
        lambda c: len(c.tensors) >= 2 and c.tensors[0].nbytes and c.tensors[0].nbytes + c.tensors[1].nbytes == c.capacity + 1,
        "capacity 7 bytes; 'a' f32[1]; 'b' f32[1]",
    ),
    "larger than the capacity": (
        packer_cases(tensors=ANY, oversize=True),
        lambda c: any(t.nbytes > c.capacity for t in c.tensors),
        "capacity 4 bytes; 'a' f32[2]",
    ),
    "many": (
        packer_cases(tensors=ANY, tiny=st.integers(0, 3000)),
        lambda c: c.tiny >= 1000,
        "capacity 1000 bytes; and 1000 tensors u8[1]",
    ),
    "a program": (
        programs(),
        lambda c: [operation for operation, _ in c.steps if operation in ("pack", "change")] == ["pack", "change"],
        "capacity 4 bytes; 'a' f32[1]; pack 0; change 0",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_smallest_example(name):
    strategy, condition, words = CASES[name]
    assert str(smallest(strategy, condition)) == words


def test_named_tensors_shrink_to_one_element_called_a():
    pairs = smallest(strategies.named_tensors(), lambda pairs: any(t.numel() for _, t in pairs))
    assert [(name, t.dtype, tuple(t.shape)) for name, t in pairs] == [("a", torch.float32, (1,))]


def test_drawn_names_shrink_to_an_ordinary_one():
    assert smallest(strategies.names(), lambda name: True) == "a.b.weight"
    assert smallest(strategies.names(), lambda name: " " in name) == "a "


def test_dtypes_shrink_to_the_common_ones():
    assert smallest(strategies.dtypes(), lambda dtype: True) is torch.float32
    assert smallest(strategies.dtypes(), lambda dtype: dtype.itemsize == 2) is torch.bfloat16
    assert smallest(strategies.dtypes(), lambda dtype: dtype.itemsize == 1) is torch.uint8


def test_plans_shrink_to_one_slot():
    plan = smallest(strategies.plans(), lambda plan: plan.nbytes)
    assert [(slot.offset, slot.nbytes) for bucket in plan.buckets for slot in bucket.slots] == [(0, 4)]
    assert plan.options.order == "given"
    assert plan.options.align == 1


def test_streams_shrink_to_two_buckets_of_one_tensor_each():
    pairs, buckets = smallest(strategies.streams(), lambda stream: len(stream[1]) == 2)
    assert [tuple(t.shape) for _, t in pairs] == [(2,)] or [t.numel() for _, t in pairs] == [1, 1]
    assert sum(bucket.nbytes for bucket in buckets) == 8
