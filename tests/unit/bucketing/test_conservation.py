"""B1 conservation and B5 capacity invariance, against an oracle that reads raw storage."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rollout_core.bucketing import Packer, pack, pack_stream, plan_buckets, specs_of, unpack, unpack_stream
from rollout_core.testing.oracles import bytes_of, picture
from support.tensors import DTYPES, capacities, from_bytes, named, odd_inputs, patterned, plan_options

ODD = odd_inputs()


def test_there_are_enough_odd_inputs():
    assert len(ODD) >= 22


@pytest.mark.parametrize("order", ["given", "packed"])
@pytest.mark.parametrize("name", ODD)
def test_b1_odd_input_alone(name, order):
    pairs = [(name, ODD[name])]
    plan = plan_buckets(specs_of(pairs), 16, order=order)
    assert picture(unpack(plan, pack(plan, pairs))) == picture(pairs)
    assert picture(unpack_stream(pack_stream(pairs, 16))) == picture(pairs)


@pytest.mark.parametrize("source", [list, iter, dict], ids=["list", "iterator", "mapping"])
@pytest.mark.parametrize("capacity", [16, 61, 1 << 20])
def test_b1_odd_inputs_together(capacity, source):
    pairs = [(name, tensor) for name, tensor in ODD.items() if name != "tied"]  # a tied name arrives early: see test_names
    plan = plan_buckets(specs_of(pairs), capacity)
    assert picture(unpack(plan, pack(plan, source(pairs)))) == picture(pairs)
    assert picture(unpack_stream(pack_stream(source(pairs), capacity))) == picture(pairs)


@given(st.data())
def test_b1_b5_any_tensors_any_options(data):
    pairs = data.draw(named())
    specs = specs_of(pairs)
    capacity = data.draw(capacities(pairs))
    plan = plan_buckets(specs, capacity, **data.draw(plan_options))
    source = data.draw(st.sampled_from([list, iter, dict]))(pairs)
    out = picture(unpack(plan, pack(plan, source), copy=data.draw(st.booleans())))
    assert {name: rest for name, *rest in out} == {name: rest for name, *rest in picture(pairs)}
    assert [name for name, *_ in out] == list(plan.arrival)
    if not plan.tied:
        assert [name for name, *_ in out] == [name for name, _ in pairs]


@given(st.data())
def test_b1_b5_streams(data):
    pairs = data.draw(named())
    capacity = data.draw(capacities(pairs))
    source = data.draw(st.sampled_from([iter, list, dict]))
    buckets = pack_stream(source(pairs), capacity, oversize=data.draw(st.sampled_from(["split", "own"])))
    out = picture(unpack_stream(buckets, copy=data.draw(st.booleans())))
    assert {name: rest for name, *rest in out} == {name: rest for name, *rest in picture(pairs)}
    if source is iter:  # a generator's ties are not known ahead, so its order is the source's to the letter
        assert [name for name, *_ in out] == [name for name, _ in pairs]


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d.itemsize <= 2], ids=str)
def test_b1_every_value_of_narrow_dtypes(dtype):
    """All bit patterns, along every way that packing copies: flat, strided and concatenated."""
    every = b"".join(i.to_bytes(dtype.itemsize, "little") for i in range(256**dtype.itemsize))
    values = from_bytes(every, dtype, (256**dtype.itemsize,))
    pairs = [("a", values), ("b", values.view(-1, 2)[:, ::2]), ("c", from_bytes(every, dtype, values.shape))]
    pairs.append(("d", from_bytes(every[::-1], dtype, values.shape)))
    plan = plan_buckets(specs_of(pairs), 1 << 22)
    out = dict(unpack(plan, pack(plan, pairs)))
    assert bytes(out["a"].view(torch.uint8).numpy()) == every
    assert bytes(out["c"].view(torch.uint8).numpy()) == every
    assert bytes(out["d"].view(torch.uint8).numpy()) == every[::-1]
    step = 2 * dtype.itemsize
    assert bytes(out["b"].reshape(-1).view(torch.uint8).numpy()) == b"".join(
        every[i : i + dtype.itemsize] for i in range(0, len(every), step)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64, torch.complex32], ids=str)
def test_b1_nan_payloads_survive_every_way_of_copying(dtype):
    """Signalling and quiet NaNs with payloads, infinities, denormals, -0.0: a copy through a float register could change them."""
    word = {torch.float64: 8}.get(dtype, 2 if dtype is torch.complex32 else 4)
    top = {2: 0x7C00, 4: 0x7F800000, 8: 0x7FF0000000000000}[word]
    words = [
        sign | bits
        for sign in (0, 1 << (8 * word - 1))
        for bits in (0, 1, top, top | 1, top | (top >> 1 & -top), 2 * top - top // 2)
    ]
    raw = b"".join((w & (256**word - 1)).to_bytes(word, "little") for w in words)
    values = from_bytes(raw, dtype, (len(raw) // dtype.itemsize,))
    pairs = [
        ("flat", values),
        ("again", from_bytes(raw, dtype, values.shape)),
        ("strided", values[::2]),
        ("neg", torch._neg_view(values)),
    ]
    plan = plan_buckets(specs_of(pairs), 1 << 20)
    for source in (pairs, iter(pairs)):
        assert picture(unpack(plan, pack(plan, source))) == picture(pairs)


def test_b1_runs_of_like_tensors_are_concatenated_exactly():
    """The fast path: neighbours of one dtype that differ in their first size."""
    pairs = [(f"w{i}", patterned(torch.bfloat16, i % 3 + 1, 5, seed=i)) for i in range(40)]
    pairs.insert(20, ("neg", torch._neg_view(patterned(torch.bfloat16, 2, 5, seed=99))))
    pairs.insert(30, ("strided", patterned(torch.bfloat16, 4, 10, seed=98)[::2, ::2]))
    plan = plan_buckets(specs_of(pairs), 1 << 20)
    assert picture(unpack(plan, Packer(plan).pack(pairs))) == picture(pairs)


def test_oracle_reads_what_torch_reads():
    """The oracle itself, on values written by hand."""
    base = torch.tensor([[1, 2, 3], [4, 5, 6]], dtype=torch.int16)
    assert bytes_of(base.t()) == b"".join(v.to_bytes(2, "little") for v in (1, 4, 2, 5, 3, 6))
    assert bytes_of(torch.tensor([1 + 2j], dtype=torch.complex64).conj()) == bytes_of(torch.tensor([1 - 2j], dtype=torch.complex64))
    assert bytes_of(torch._neg_view(torch.tensor([1.0]))) == bytes_of(torch.tensor([-1.0]))
