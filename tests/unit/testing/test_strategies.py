"""The strategies reach every edge that they promise, and wrong arguments teach the right ones."""

from __future__ import annotations

import contextlib
import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.errors import InvalidArgument

import rollout_core.testing.strategies as strategies
from rollout_core.bucketing import BucketPlan, TensorSpec, unpack_stream
from rollout_core.errors import ManifestError
from rollout_core.testing.cases import LAYOUTS, make_tensors
from rollout_core.testing.oracles import bytes_of, picture

#: Every dtype of torch but the quantized ones, found in torch itself.
QUANTIZED = {torch.qint8, torch.qint32, torch.quint8, torch.quint4x2, torch.quint2x4}
DTYPES = {v for v in vars(torch).values() if isinstance(v, torch.dtype)} - QUANTIZED


def seen(strategy, describe, examples=600):
    """All descriptions of so many examples."""
    found = set()

    @settings(max_examples=examples, database=None, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
    @given(strategy)
    def collect(value):
        found.update(describe(value))

    collect()
    return found


def test_dtypes_are_all_that_torch_has():
    assert seen(strategies.dtypes(), lambda dtype: [dtype]) == DTYPES
    assert torch.bool not in seen(strategies.dtypes(exclude=[torch.bool]), lambda dtype: [dtype])


def edges(pairs):
    storages = {}
    for name, tensor in pairs:
        yield f"dtype {tensor.dtype}"
        yield f"dims {tensor.dim()}"
        if not tensor.numel():
            yield "no elements"
        if tensor.is_conj():
            yield "conj"
        if tensor.is_neg():
            yield "neg"
        if not tensor.is_contiguous():
            yield "not contiguous"
        if 0 in tensor.stride() and tensor.numel() > 1:
            yield "expanded"
        if tensor.storage_offset():
            yield "later in its storage"
        if tensor.numel() == 1 and tensor.dim() == 1 and tensor.stride(0) > 1:
            yield "one element with an odd stride"
        if tensor.numel() and tensor.untyped_storage().nbytes() > 8 * tensor.numel() * tensor.dtype.itemsize:
            yield "small part of a large storage"
        if tensor.dtype == torch.float32 and tensor.isnan().any():
            yield "NaN"
        if tensor.dtype == torch.float32 and b"\x00\x00\x00\x80" in bytes_of(tensor):
            yield "-0.0"
        if tensor.numel() and tensor.untyped_storage().data_ptr() in storages:
            other = storages[tensor.untyped_storage().data_ptr()]
            same = (other.shape, other.data_ptr()) == (tensor.shape, tensor.data_ptr())
            yield "tied" if other is tensor else "same view" if same else "shares storage"
        storages.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        if tensor.numel() * tensor.dtype.itemsize % 2 and pairs[-1][0] != name:
            yield "odd size before another"


def test_named_tensors_reach_every_edge():
    wanted = {f"dtype {dtype}" for dtype in DTYPES} | {f"dims {n}" for n in range(4)}
    wanted |= {"no elements", "conj", "neg", "not contiguous", "expanded", "later in its storage", "one element with an odd stride"}
    wanted |= {"small part of a large storage", "NaN", "-0.0", "tied", "same view", "shares storage", "odd size before another"}
    missing = wanted - seen(strategies.named_tensors(), edges, 1500)
    assert not missing


def test_capacities_reach_every_edge():
    specs = [TensorSpec("a", torch.float32, (3,)), TensorSpec("b", torch.bfloat16, (1,)), TensorSpec("c", torch.uint8, (5,))]
    fitting = seen(strategies.capacities(specs), lambda capacity: [capacity], 300)
    assert {12, 13, 14, 18, 19, 20} <= fitting  # the largest, two, all; each exactly, one more and one less
    assert min(fitting) == 12
    small = seen(strategies.capacities(specs, oversize=True), lambda capacity: [capacity], 300)
    assert min(small) == 4  # one element of the widest dtype
    assert {11, 12} <= small
    assert seen(strategies.capacities([]), lambda capacity: [capacity], 50) <= set(range(1, 12))


def test_cases_with_thousands_of_tiny_tensors():
    tiny = strategies.packer_cases(tiny=st.integers(2000, 3000))
    assert seen(tiny, lambda case: [case.tiny >= 2000, len(case.all_tensors()) >= 2000], 10) == {True}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_data_is_made_late_and_twice_the_same(layout):
    @settings(max_examples=25, database=None, deadline=None)
    @given(strategies.tensor_cases(layouts=st.just(layout), fills=strategies.fills()))
    def check(cases):
        one, two = make_tensors(cases), make_tensors(cases)
        assert picture(one) == picture(two)
        assert [(t.name, t.torch_dtype, t.shape) for t in cases] == [(n, t.dtype, tuple(t.shape)) for n, t in one]

    check()


def test_another_seed_changes_every_tensor():
    cases = [strategies.TensorCase("a", shape=(3,)), strategies.TensorCase("b", "bfloat16", (2, 2))]
    for (_, one), (_, two) in zip(make_tensors(cases, seed=1), make_tensors(cases, seed=2), strict=True):
        assert not (one == two).any()


def test_making_tensors_warns_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        seen(strategies.named_tensors(), lambda pairs: [], 200)


@settings(max_examples=50, deadline=None)
@given(strategies.streams())
def test_streams_are_of_their_tensors(stream):
    pairs, buckets = stream
    arrived = picture(unpack_stream(buckets))
    assert sorted(arrived, key=lambda p: p.name) == sorted(picture(pairs), key=lambda p: p.name)


@settings(max_examples=50, deadline=None)
@given(strategies.plans(), strategies.manifests(), strategies.hostile_manifests())
def test_manifests_are_plans_and_hostile_ones_mostly_not(plan, manifest, hostile):
    assert BucketPlan.from_bytes(plan.to_bytes()) == plan
    assert BucketPlan.from_bytes(manifest).to_bytes() == manifest
    with contextlib.suppress(ManifestError):
        BucketPlan.from_bytes(hostile)


#: strategy, what the message begins with, and what it says to do.
WRONG = {
    "dtypes": (strategies.named_tensors(dtypes=torch.float32), "dtypes=torch.float32 is a dtype", "st.just(torch.float32)"),
    "shapes": (strategies.named_tensors(shapes=(2, 3)), "shapes=(2, 3) is a tuple", "st.just((2, 3))"),
    "names": (strategies.tensor_specs(names="w"), "names='w' is a str", "st.just('weight')"),
    "layouts": (strategies.tensor_cases(layouts="strided"), "layouts='strided' is a str", "st.just('strided')"),
    "tiny": (strategies.packer_cases(tiny=5), "tiny=5 is an int", "st.just(1000)"),
    "plans": (strategies.plans(specs=[]), "specs=[] is a list", "st.just(specs_of(model))"),
    "manifests": (strategies.hostile_manifests(manifests=b"x"), "manifests=b'x' is a bytes", "st.just(plan.to_bytes())"),
    "sizes": (strategies.named_tensors(min_size=3, max_size=2), "min_size=3, max_size=2: 0 <= min_size <= max_size must hold", ""),
    "dims": (strategies.shapes(min_dims=2, max_dims=1), "shapes(min_dims=2, max_dims=1): 0 <= min_dims <= max_dims must hold", ""),
    "sides": (strategies.shapes(min_side=-1), "shapes(min_side=-1, max_side=5): 0 <= min_side <= max_side must hold", ""),
    "exclude": (
        strategies.dtypes(exclude=[torch.qint8]),
        "dtypes(exclude=...) has torch.qint8, which is no dtype that travels; pass for example [torch.bool]",
        "",
    ),
    "specs": (
        strategies.capacities(["a"]),
        "capacities() was given a str; pass a list of TensorSpec, for example specs_of(model)",
        "",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_argument_is_refused_when_drawn_and_says_what_to_pass(name):
    strategy, message, example = WRONG[name]
    if example:
        message += f", not a strategy; pass one, for example {example}"

    @settings(max_examples=1, database=None)
    @given(strategy)
    def draw(value):
        pass

    with pytest.raises(InvalidArgument) as raised:
        draw()
    assert str(raised.value) == message
