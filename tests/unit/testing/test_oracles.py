"""The oracles and invariants, against what is known by hand."""

from __future__ import annotations

import struct

import pytest
import torch

from rollout_core.testing import invariants
from rollout_core.testing.cases import TensorCase
from rollout_core.testing.oracles import Picture, bytes_of, difference, live_tensor_bytes, picture

F32 = torch.float32


def test_bytes_are_those_that_struct_gives():
    tensor = torch.tensor([[1.0, -2.5, 3.0], [4.0, 5.0, 6.0]])
    assert bytes_of(tensor) == struct.pack("<6f", 1.0, -2.5, 3.0, 4.0, 5.0, 6.0)
    assert bytes_of(tensor[:, ::2]) == struct.pack("<4f", 1.0, 3.0, 4.0, 6.0)
    assert bytes_of(tensor.t()) == struct.pack("<6f", 1.0, 4.0, -2.5, 5.0, 3.0, 6.0)
    assert bytes_of(tensor[1]) == struct.pack("<3f", 4.0, 5.0, 6.0)
    assert bytes_of(tensor[:1].expand(2, 3)) == struct.pack("<6f", 1.0, -2.5, 3.0, 1.0, -2.5, 3.0)
    assert bytes_of(torch._neg_view(tensor[0])) == struct.pack("<3f", -1.0, 2.5, -3.0)
    assert bytes_of(torch.empty(2, 0)) == b""
    assert bytes_of(torch.tensor(7, dtype=torch.int16)) == b"\x07\x00"


def test_conjugates_are_resolved_by_hand():
    tensor = torch.tensor([1 + 2j, 3 - 4j])
    assert bytes_of(tensor.conj()) == struct.pack("<4f", 1.0, -2.0, 3.0, 4.0)
    assert bytes_of(torch._neg_view(tensor)) == struct.pack("<4f", -1.0, -2.0, -3.0, 4.0)
    assert bytes_of(tensor.conj().imag) == struct.pack("<2f", -2.0, 4.0)


def row(name, *values, dtype=F32):
    return picture([(name, torch.tensor(values, dtype=dtype))])[0]


@pytest.mark.parametrize(
    ("model", "actual", "words"),
    [
        ([row("a", 1.0)], [row("a", 1.0)], None),
        ([row("a", 1.0), row("b", 2.0)], [row("a", 1.0)], "'b' did not arrive (model: 'a', 'b', actual: 'a')"),
        ([row("a", 1.0)], [], "'a' did not arrive (model: 'a', actual: nothing)"),
        ([row("a", 1.0)], [row("a", 1.0)] * 2, "'a' came more often than sent (model: 'a', actual: 'a', 'a')"),
        (
            [row("a", 1.0), row("b", 2.0)],
            [row("b", 2.0), row("a", 1.0)],
            "the names came in another order (model: 'a', 'b', actual: 'b', 'a')",
        ),
        (
            [row("a", 1.0)],
            [row("a", 1.0, dtype=torch.bfloat16)],
            "'a' has another dtype (model: torch.float32, actual: torch.bfloat16)",
        ),
        ([row("a", 1.0)], [row("a", 1.0, 1.0)], "'a' has another shape (model: [1], actual: [2])"),
        (
            [row("a", 1.0, 2.0, 3.0)],
            [row("a", 1.0, -2.0, 4.0)],
            "'a' has other bytes in 2 of 3 elements, first in element 1 (model: 00000040, actual: 000000c0)",
        ),
        (
            [row(chr(97 + i), 1.0) for i in range(8)],
            [],
            "'a', 'b', 'c', 'd', 'e', 'f', ... (8 in all) did not arrive "
            "(model: 'a', 'b', 'c', 'd', 'e', 'f', ... (8 in all), actual: nothing)",
        ),
    ],
)
def test_a_difference_is_told_with_the_model_beside_what_came(model, actual, words):
    assert difference(model, actual) == words


def test_nan_payloads_and_negative_zero_are_differences():
    nans = [torch.tensor([bits], dtype=torch.int32).view(F32) for bits in (0x7FC00001, 0x7FC00002)]
    assert torch.equal(nans[0], nans[0]) is False  # what a comparison of values would make of it
    assert difference(picture([("a", nans[0])]), picture([("a", nans[0])])) is None
    assert difference(picture([("a", nans[0])]), picture([("a", nans[1])])) is not None
    assert difference([row("a", 0.0)], [row("a", -0.0)]) is not None


def test_a_picture_is_readable():
    assert str(row("a", 1.0)) == "'a' float32[1] 0000803f"
    assert str(row("a", *[1.0] * 5)) == "'a' float32[5] 0000803f0000803f0000803f0000803f... (20 bytes)"
    assert str(Picture("a", F32, (0,), b"")) == "'a' float32[0] no bytes"


CASES = {"a": TensorCase("a", "bfloat16"), "b": TensorCase("b", "float32", (3,)), "c": TensorCase("c", "uint8")}


INVARIANTS = [
    (invariants.within_capacity([4, 8], 8), None),
    (invariants.within_capacity([4, 9], 8), "bucket 1 has 9 bytes (capacity: 8)"),
    (invariants.aligned([[("a", 0, 2), ("b", 4, 12)]], CASES), None),
    (invariants.aligned([[("?", 1, 2)]], CASES), None),
    (
        invariants.aligned([[], [("a", 6, 2), ("b", 10, 12)]], CASES),
        "bucket 1: slot 'a' bf16[1] at offset 6, then 'b' f32[3] at offset 10: not a multiple of 4",
    ),
    (invariants.aligned([[("b", 2, 12)]], CASES), "bucket 0: slot 'b' f32[3] at offset 2: not a multiple of 4"),
    (invariants.disjoint([[("b", 4, 12), ("a", 0, 4)]]), None),
    (invariants.disjoint([[("b", 3, 12), ("a", 0, 4)]]), "bucket 0: slot 'a' takes bytes 0 to 4, and slot 'b' starts at 3"),
    (invariants.disjoint([[("b", 0, 4), ("a", 2, 0), ("c", 4, 1)]]), None),
    (invariants.in_bounds([[("a", 0, 4)]], [4]), None),
    (invariants.in_bounds([[("a", 1, 4)]], [4]), "bucket 0 has 4 bytes, and slot 'a' takes bytes 1 to 5"),
    (invariants.in_bounds([[("a", -1, 4)]], [4]), "bucket 0 has 4 bytes, and slot 'a' takes bytes -1 to 3"),
    (invariants.covered([[("a", 0, 2), ("b", 4, 12)]], [16], 4), None),
    (
        invariants.covered([[("a", 0, 2), ("b", 8, 12)]], [20], 4),
        "bucket 0: 6 bytes before slot 'b' belong to nothing (alignment: 4)",
    ),
    (invariants.covered([[("a", 0, 2)]], [6], 4), "bucket 0 has 6 bytes, and its last slot ends at 2 (alignment: 4)"),
    (invariants.covered([[]], [0], 1), None),
    (invariants.zero_padding(0, torch.tensor([5, 0, 7], dtype=torch.uint8), [("c", 0, 1), ("c", 2, 1)]), None),
    (
        invariants.zero_padding(2, torch.tensor([5, 9, 7], dtype=torch.uint8), [("c", 0, 1), ("c", 2, 1)]),
        "bucket 2: byte 1 is padding and has the value 9 (model: 0)",
    ),
]


@pytest.mark.parametrize("place", range(len(INVARIANTS)))
def test_invariants(place):
    problem, words = INVARIANTS[place]
    assert problem == words


def test_live_tensors_are_counted_once_a_storage():
    before = live_tensor_bytes()
    tensor = torch.zeros(1000, dtype=torch.uint8)
    views = [tensor[1:], tensor.view(10, 100)]
    assert live_tensor_bytes() - before == 1000
    del tensor, views
    assert live_tensor_bytes() == before
