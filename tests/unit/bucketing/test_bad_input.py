"""Tensors that cannot be packed: each has its own error, names the tensor, and leaves nothing behind."""

from __future__ import annotations

import re

import pytest
import torch

from rollout_core.bucketing import TensorSpec, iter_buckets, pack, pack_stream, plan_buckets, specs_of
from rollout_core.errors import CapacityError, SourceError
from support.tensors import DTYPES

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # torch calls some of these layouts a prototype


def fake():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        return torch.ones(2)


class MadeOfTensors(torch.Tensor):
    """A wrapper as torchao's quantised weights are."""

    @staticmethod
    def __new__(cls):
        return torch.Tensor._make_wrapper_subclass(cls, (2,))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} was called on a tensor without bytes")

    def __tensor_flatten__(self):
        return ["inner"], None


BAD = {
    "sparse": (lambda: torch.eye(2).to_sparse(), "tensor 'bad' has layout sparse_coo, not strided"),
    "sparse csr": (lambda: torch.eye(2).to_sparse_csr(), "tensor 'bad' has layout sparse_csr, not strided"),
    "nested": (lambda: torch.nested.nested_tensor([torch.ones(1), torch.ones(2)]), "tensor 'bad' has layout nested, not strided"),
    "jagged": (
        lambda: torch.nested.nested_tensor([torch.ones(1), torch.ones(2)], layout=torch.jagged),
        "tensor 'bad' has layout nested, not strided",
    ),
    "quantized": (lambda: torch._empty_affine_quantized([2], scale=1.0, zero_point=0, dtype=torch.qint8), "'bad' is quantized"),
    "fake": (fake, "tensor 'bad' is a FakeTensor, which holds no bytes of its own"),
    "wrapper": (MadeOfTensors, "tensor 'bad' is a MadeOfTensors, which holds no bytes of its own"),
    "no tensor": (lambda: [1.0], "tensor 'bad' is a list, not a torch.Tensor"),
    "none": (lambda: None, "tensor 'bad' is a NoneType, not a torch.Tensor"),
    "quantized dtype": (lambda: torch.empty(2, dtype=torch.uint8).view(torch.quint8), "tensor 'bad'"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_is_no_plain_bytes_is_refused_by_name(kind):
    make, message = BAD[kind]
    pairs = [("good", torch.ones(2)), ("bad", make())]
    with pytest.raises(SourceError, match=message):
        specs_of(pairs)
    for stream in (pack_stream(iter(pairs), 64), iter_buckets(pairs, 64)):
        got = []
        with pytest.raises(SourceError, match=message):
            for bucket in stream:
                got.append(bucket)
        assert got == []
    plan = plan_buckets(specs_of([("good", torch.ones(2)), ("bad", torch.ones(2))]), 64)
    for source in (pairs, iter(pairs), dict(pairs)):
        with pytest.raises(SourceError, match=message):
            list(pack(plan, source))


def test_a_meta_tensor_can_be_planned_and_not_packed():
    pairs = [("bad", torch.ones(2, device="meta"))]
    plan = plan_buckets(specs_of(pairs), 64)
    for packed in (pack(plan, pairs), pack(plan, iter(pairs)), pack_stream(iter(pairs), 64), iter_buckets(pairs, 64)):
        with pytest.raises(SourceError, match="tensor 'bad' is on the meta device and has no data to pack; load the weights"):
            list(packed)


def test_like_meta_tensors_are_refused_too():
    """On the way that copies like tensors at once as well."""
    pairs = [(f"w{i}", torch.ones(2, 3, device="meta")) for i in range(5)]
    plan = plan_buckets(specs_of(pairs), 1 << 10)
    with pytest.raises(SourceError, match="tensor 'w0' is on the meta device"):
        list(pack(plan, pairs))


def test_tied_meta_tensors_are_found():
    weight = torch.nn.Parameter(torch.ones(2, device="meta"))
    specs = specs_of([("a", weight), ("b", weight), ("c", torch.ones(2, device="meta"))])
    assert [spec.alias_of for spec in specs] == [None, "a", None]


@pytest.mark.parametrize("shape", [[2], (-1,), (1.0,), (True,), "2", None])
def test_bad_shapes_of_a_spec(shape):
    with pytest.raises(SourceError, match="tensor 'w' has shape .*, which is no tuple of sizes >= 0"):
        TensorSpec("w", torch.float32, shape)


@pytest.mark.parametrize("dtype", [torch.qint8, "float32", None, int])
def test_bad_dtypes_of_a_spec(dtype):
    with pytest.raises(SourceError, match="tensor 'w' has dtype .*, which does not travel"):
        TensorSpec("w", dtype, (1,))


def test_a_tensor_larger_than_an_offset_can_say():
    with pytest.raises(CapacityError, match=r"tensor 'w' \(f64\[4611686018427387904, 1\]\) is larger than 2\*\*63 - 1 bytes"):
        TensorSpec("w", torch.float64, (1 << 62, 1))


def test_a_spec_knows_its_sizes():
    spec = TensorSpec("w", torch.bfloat16, (3, 0, 5))
    assert (spec.numel, spec.nbytes, str(spec)) == (0, 0, "bf16[3, 0, 5]")
    assert TensorSpec("w", torch.float64, ()).nbytes == 8


SHORT = [(r"bfloat", "bf"), (r"^float", "f"), (r"^complex", "c"), (r"^uint", "u"), (r"^int", "i"), (r"f8_e(\dm\d)fn$", r"f8e\1")]
SHORT += [
    (r"f8_e(\dm\d)(fnuz)$", r"f8e\1\2"),
    (r"f8_e(5m2)$", r"f8e\1"),
    (r"f8_e8m0fnu$", "f8e8m0"),
    (r"f4_e2m1fn_x2$", "f4e2m1x2"),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_messages_call_every_dtype_by_its_short_name(dtype):
    expected = str(dtype).removeprefix("torch.")
    for pattern, short in SHORT:
        expected = re.sub(pattern, short, expected)
    assert str(TensorSpec("w", dtype, (2,))) == f"{expected}[2]"


def test_plan_buckets_wants_specs():
    with pytest.raises(SourceError, match=r"plan_buckets takes TensorSpecs and was given a tuple; call specs_of\(...\) first"):
        plan_buckets([("w", torch.ones(1))], 8)


def test_split_is_no_option_for_lists():
    with pytest.raises(ValueError, match="a list of whole tensors cannot hold a piece; pass 'own' or 'error'"):
        iter_buckets([], 8, oversize="split")


@pytest.mark.parametrize("capacity", [0, -5, 2.5, float("nan"), True])
def test_bad_capacities_everywhere(capacity):
    for call in (pack_stream, iter_buckets):
        with pytest.raises(CapacityError, match="it is a whole number of bytes"):
            call([], capacity)
